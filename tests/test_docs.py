"""Links of the pages, and the configs that the README shows."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('configs/*/README.md')]
CONFIGS = re.findall(r'```python\n(_base_ = .*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.DOTALL)


def links(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links to, and the heading within each, or an empty string."""
    text = re.sub(r'```.*?```', '', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    targets = [target.partition('#') for target in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in targets]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r'(?m)^#+ (.*)$', page.read_text(encoding='utf-8'))
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f'{target}#{anchor}'


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / 'README.md'}
    while new:
        reached |= new
        new = {target for page in new for target, _ in links(page) if target.suffix == '.md'} - reached
    assert reached >= set(PAGES)


@pytest.mark.parametrize('text', CONFIGS, ids=['detection', 'segmentation'])
def test_configs_in_the_readme_build_and_run(text, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(text, encoding='utf-8')
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    assert type(model.backbone).__name__ == 'SpatialMamba'
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 64, 64))
        if cfg.default_scope == 'mmseg':
            assert model.decode_head(features).shape == (1, 150, 16, 16)
            assert model.auxiliary_head(features).shape == (1, 150, 4, 4)
