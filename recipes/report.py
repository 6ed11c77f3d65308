"""Write RESULTS.md and the measured parts of README.md and the docs from the records in results/

    python recipes/report.py
"""
from fastcore.script import call_parse

from grdd_fastai.experiments.report import write_report


@call_parse
def main(
    root:str='.', # folder of the checkout
):
    "Write RESULTS.md and the measured parts of README.md and the docs from the records in results/"
    write_report(root)
