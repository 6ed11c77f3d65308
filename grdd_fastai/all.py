"""Everything a notebook or a recipe needs: `from grdd_fastai.all import *`."""
from fastai.callback.schedule import *  # noqa: F401  (fit_one_cycle, lr_find)

from .augment import *
from .callbacks import *
from .data import *
from .distributed import *
from .errors import *
from .evaluate import *
from .inference import *
from .learners import *
from .losses import *
from .models import *
from .networks import *
from .optim import *
from .pack import *
from .plots import *
from .precision import *
from .predict import *
from .prepare import *
from .publish import *
from .run import *
from .stages import *
from .study import *
from .tables import *
from .transductive import *
