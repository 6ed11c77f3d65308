"""Everything a notebook or a recipe needs: `from grdd_fastai.all import *`."""
from fastai.callback.schedule import *  # noqa: F401  (fit_one_cycle, lr_find)

from .core.device import *
from .core.distributed import *
from .core.errors import *
from .data.augment import *
from .data.blocks import *
from .data.cache import *
from .data.episodes import *
from .data.images import *
from .data.loaders import *
from .data.sources import *
from .experiments.plots import *
from .experiments.publish import *
from .experiments.store import *
from .experiments.table import *
from .fewshot.classifiers import *
from .fewshot.embed import *
from .fewshot.evaluate import *
from .fewshot.inductive import *
from .fewshot.predict import *
from .fewshot.stats import *
from .fewshot.transductive import *
from .losses import *
from .models.create import *
from .models.pretrained import *
from .runs.run import *
from .stage_one import *
from .stage_two import *
from .stages import *
from .training.callbacks import *
from .training.learner import *
from .training.optim import *
from .training.schedules import *
from .training.validation import *
