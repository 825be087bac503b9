"""Tests marked ``interpreted`` run in a process of their own, with TRITON_INTERPRET=1.

Triton reads the variable when it is imported, and other tests may have imported it without. So the chosen tests run in
one second pytest, and the first one's share includes it; here each reports what came of it there. Where the variable is
set already they simply run.
"""

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from test_ops.triton.cases import INTERPRETED


def pytest_configure(config):
    config.addinivalue_line('markers', "interpreted: runs in Triton's interpreter, on the CPU")


@pytest.fixture(scope='session')
def interpreted_results(request, tmp_path_factory) -> dict:
    """What came of each chosen test that is marked ``interpreted``, by its name."""
    pytest.importorskip('triton')
    report = tmp_path_factory.mktemp('interpreted') / 'report.xml'
    chosen = [item.nodeid for item in request.session.items if item.get_closest_marker('interpreted')]
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', *chosen]
    run = subprocess.run(
        command,
        cwd=request.config.rootpath,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert report.exists(), run.stdout + run.stderr
    return {case.get('name'): case for case in ElementTree.parse(report).iter('testcase')}


@pytest.fixture(autouse=True)
def interpreted_result(request):
    """What came of this test in the other process, where it is one to run there."""
    if INTERPRETED or not request.node.get_closest_marker('interpreted'):
        return None
    return request.getfixturevalue('interpreted_results')[request.node.name]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    result = pyfuncitem.funcargs['interpreted_result']
    if result is None:
        return None
    for outcome in result:
        if outcome.tag in ('failure', 'error'):
            pytest.fail(outcome.text, pytrace=False)
        if outcome.tag == 'skipped':
            pytest.skip(outcome.get('message'))
    return True
