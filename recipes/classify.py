"""Classify photos by a few examples of each class, without any training

    python recipes/classify.py new/ --support few/ --report photos.html --csv photos.csv
    python recipes/classify.py new/ --support few/ --unknown 0.1 --save my-classes
    python recipes/classify.py more/ --load my-classes

`few/` has a folder of photos for each class, named after it; five photos of each are a good beginning. The table is printed. The report is
one HTML page with small pictures, the accuracy to expect and what is wrong with the examples.
"""
import warnings

from fastcore.script import call_parse

from grdd_fastai.core.distributed import log
from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import atomic_write, user_path
from grdd_fastai.photos.classifier import make_classifier
from grdd_fastai.photos.report import write_page
from grdd_fastai.settings import exact_flags


@call_parse
@exact_flags
def main(
    photos:str, # photos to classify: a file, a folder, or a pattern in quotes such as 'new/*.jpg'
    support:str=None, # folder with a folder of example photos for each class
    load:str=None, # in place of --support: folder of a saved classifier
    network:str=None, # a timm name with weights, a folder of a run or of recipes/publish.py (convnet4.grdd_cifarfs)
    classifier:str=None, # classifier, or auto: the best for photos that are held out (simpleshot_l2n)
    unknown:float=None, # share of photos of these classes that may be called unknown, so that photos of others are (none)
    report:str=None, # HTML file to write
    csv:str=None, # CSV file to write
    save:str=None, # folder to save the classifier in
    export:str=None, # folder for the classifier as an ONNX file, with a program that needs no PyTorch
):
    "Classify photos by a few examples of each class"
    if not (support or load): raise UserError('give --support with examples of each class, or --load with a saved classifier')
    warnings.showwarning = lambda message, *_: log(f'warning: {message}')
    few = make_classifier(support, load, network=network, classifier=classifier, unknown=unknown)
    if save: log(f'saved in {few.save(save)}')
    if export: log(f'exported to {few.export_onnx(export)}')
    try: log(few.check())
    except UserError as e: log(f'The accuracy to expect is not known: {e}.')
    table = few.predict_table(photos)
    text = table.drop(columns='problem').to_string(index=False, float_format='{:.2f}'.format)
    print(text.encode('utf-8', 'replace').decode()) # names of files may hold anything
    if csv:
        user_path(csv).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(user_path(csv), table.to_csv(index=False).encode('utf-8', 'replace'))
    if report: log(f'{write_page(report, few, photos, table)} shows the photos')
