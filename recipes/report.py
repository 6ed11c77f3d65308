"""Write RESULTS.md and the measured parts of README.md and the docs from the records in results/

    python recipes/report.py
"""
from fastcore.script import call_parse

from grdd_fastai.experiments.report.files import write_report
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
def main(
    root:str='.', # folder of the checkout
):
    "Write RESULTS.md and the measured parts of README.md and the docs from the records in results/"
    write_report(root)
