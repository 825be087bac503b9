"""Packages mmspatialmamba: pure Python, with configs and tools in ``mmspatialmamba/.mim``."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / 'mmspatialmamba'


def mim_sources() -> list[Path]:
    """List what OpenMMLab's tools look for in ``.mim``.

    Returns:
        list[Path]: The ``configs`` and ``tools`` folders, and ``model-index.yml``.
    """
    return [ROOT / 'configs', ROOT / 'tools', ROOT / 'model-index.yml']


def requirements(name: str) -> list[str]:
    """Read ``requirements/NAME.txt``.

    Args:
        name (str): The file's name without its suffix.

    Returns:
        list[str]: One requirement per entry, comments left out.
    """
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


class BuildPy(build_py):
    """Copies ``.mim`` into a build, or links it into the checkout of an editable install."""

    def run(self):
        super().run()
        if self.editable_mode:
            self.link_mim()
        else:
            self.copy_mim(Path(self.build_lib) / 'mmspatialmamba' / '.mim')

    @staticmethod
    def link_mim():
        mim = PACKAGE / '.mim'
        if mim.exists():
            shutil.rmtree(mim)
        mim.mkdir()
        for source in mim_sources():
            (mim / source.name).symlink_to(os.path.relpath(source, mim))

    @staticmethod
    def copy_mim(mim):
        if mim.exists():
            shutil.rmtree(mim)
        mim.mkdir(parents=True)
        for source in mim_sources():
            if source.is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '*.py[co]')
                shutil.copytree(source, mim / source.name, ignore=ignore)
            else:
                shutil.copy2(source, mim / source.name)


class EditableWheel(editable_wheel):
    """Lets ``mmengine.utils.get_installed_path`` find the package of an editable install.

    That function joins the folder which holds the distribution's metadata, here site-packages, with
    the first line of ``top_level.txt``. An absolute path there wins the join, so ``.mim`` is found.
    """

    def run(self):
        if self.dist_info_dir is None:
            dist_info = self.reinitialize_command('dist_info', output_dir=self.dist_dir)
            self.run_command('dist_info')
            self.dist_info_dir = dist_info.dist_info_dir
        top_level = Path(self.dist_info_dir, 'top_level.txt')
        top_level.write_text(f'{PACKAGE}\nmmspatialmamba\n', encoding='utf-8')
        super().run()


setup(
    name='mmspatialmamba',
    version=runpy.run_path(str(PACKAGE / 'version.py'))['__version__'],
    description='Spatial-Mamba backbones for mmdet, mmseg and mmpretrain',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, state space model, backbone, OpenMMLab',
    python_requires='>=3.9',
    packages=find_packages(include=['mmspatialmamba', 'mmspatialmamba.*']),
    install_requires=['numpy'],
    extras_require={
        'openmmlab': requirements('openmmlab'),
        'demo': requirements('runtime'),
        'tests': requirements('tests'),
    },
    cmdclass={'build_py': BuildPy, 'editable_wheel': EditableWheel},
    zip_safe=False,
)
