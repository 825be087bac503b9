"""Write the tables of models in the README of each config folder from its metafile, or check them."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMAND = 'python tools/misc/generate_readme.py'
START = f'<!-- Tables of metafile.yml, written by {COMMAND} -->\n'
END = '<!-- End of the tables -->\n'


def load_models(path: Path) -> list[dict]:
    """Read the models of a metafile.

    Args:
        path (Path): The metafile.

    Returns:
        list[dict]: Its models.

    Raises:
        SystemExit: If it is no YAML, or a model lacks its name, its config or its data set.
    """
    try:
        models = yaml.safe_load(path.read_text(encoding='utf-8'))['Models']
    except yaml.YAMLError as error:
        raise SystemExit(f'{path.relative_to(ROOT)}: {" ".join(str(error).split())}') from error
    for number, model in enumerate(models, start=1):
        missing = [key for key in ('Name', 'Config') if key not in model]
        missing += ['Training Data'] if 'Training Data' not in model.get('Metadata', {}) else []
        if missing:
            name = model.get('Name', f'number {number}')
            raise SystemExit(f'{path.relative_to(ROOT)}: model {name} lacks {" and ".join(missing)}')
    return models


def get_metrics(model: dict) -> dict[str, float]:
    """Return a model's results by the names of their metrics."""
    return {name: value for result in model.get('Results') or [] for name, value in result['Metrics'].items()}


def make_row(model: dict, metrics: list[str]) -> list[str]:
    """Make the row of a model.

    Args:
        model (dict): An entry of a metafile.
        metrics (list[str]): Names of the metrics to show.

    Returns:
        list[str]: The cells. A model without results is "not trained yet".
    """
    data, results, source = model['Metadata'], get_metrics(model), model.get('Converted From')
    cells = [
        f'[{model["Name"]}]({Path(model["Config"]).name})',
        f'{data["Epochs"]} epochs' if 'Epochs' in data else '-',
        f'{data["Parameters"] / 1e6:.4g} M' if 'Parameters' in data else '-',
        f'{data["FLOPs"] / 1e9:.4g} G' if 'FLOPs' in data else '-',
        f'{data["Training Memory (GB)"]} GB' if 'Training Memory (GB)' in data else '-',
        *(f'{results[name]:.1f}' if name in results else '-' for name in metrics),
        f'[original release]({source["Weights"]})' if source else '-',
    ]
    if 'Iterations' in data:
        cells[1] = f'{data["Iterations"] // 1000}k iterations'
    if not results:
        cells[5] = 'not trained yet'
    return cells


def make_tables(models: list[dict]) -> str:
    """Make a table for each data set.

    Args:
        models (list[dict]): The entries of a metafile.

    Returns:
        str: Markdown.
    """
    metrics = list(dict.fromkeys(name for model in models for name in get_metrics(model)))
    head = ['model', 'schedule', 'parameters', 'multiply-adds', 'training memory', *metrics, 'weights']
    text = ''
    for dataset in dict.fromkeys(model['Metadata']['Training Data'] for model in models):
        rows = [make_row(model, metrics) for model in models if model['Metadata']['Training Data'] == dataset]
        lines = [f'| {" | ".join(row)} |\n' for row in [head, ['---'] * len(head), *rows]]
        text += f'\n### {dataset}\n\n{"".join(lines)}'
    return f'{text}\n'


def main() -> None:
    """Write what is out of date, or name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if a README is out of date')
    check = parser.parse_args().check
    tables = {path: make_tables(load_models(path)) for path in sorted(ROOT.glob('configs/*/metafile.yml'))}
    stale = {}
    for path, text in tables.items():
        readme = path.with_name('README.md')
        before, start, rest = readme.read_text(encoding='utf-8').partition(START)
        old, end, after = rest.partition(END)
        if not (start and end):
            raise SystemExit(f'{readme.relative_to(ROOT)} lacks the lines {START.strip()} and {END.strip()}')
        if old != text:
            stale[readme] = f'{before}{START}{text}{END}{after}'
    names = ', '.join(str(path.relative_to(ROOT)) for path in stale)
    if check and stale:
        raise SystemExit(f'{names}: differs from what the metafile says; run {COMMAND}')
    for path, text in stale.items():
        path.write_text(text, encoding='utf-8')
    print(f'written: {names}' if stale else 'every README is up to date')


if __name__ == '__main__':
    main()
