"""Everything that a notebook or a script needs: `from grdd_fastai.all import *`."""
import fastai.callback.schedule  # noqa: F401  (gives Learners fit_one_cycle and lr_find)

from .core.distributed import processes
from .core.errors import UserError
from .data.augment import BatchAugmentation, train_augmentation
from .data.blocks import category_block, category_dls, episode_block, episodic_dls, plain_dl
from .data.cache import few_shot_data
from .data.episodes import EpisodicDL, sample_episodes
from .data.sources import prepare
from .distillation import Distill, RelatednessKL, Teacher
from .fewshot.classifiers import CLASSIFIERS, register_classifier
from .fewshot.embed import cached_features, embed
from .fewshot.evaluate import evaluate
from .fewshot.interpret import EpisodeInterpretation
from .fewshot.stats import compare
from .grdd import grdd
from .losses import EpisodicLoss, relatedness
from .models.create import create_backbone
from .models.pretrained import load_network
from .photos.classifier import FewShotClassifier
from .plots import plot_relatedness, plot_tsne
from .stage_one import StageOne, global_learner, stage_one
from .stage_two import StageTwo, get_preset, known_features, meta_learner, stage_two
from .terms import DistillationTerm
from .training.callbacks import LossTerm
from .training.optim import muon, sgd
from .training.validation import FewShotAccuracy, KeepBest

__all__ = ['BatchAugmentation', 'CLASSIFIERS', 'Distill', 'DistillationTerm', 'EpisodeInterpretation', 'EpisodicDL', 'EpisodicLoss',
           'FewShotAccuracy', 'FewShotClassifier', 'KeepBest', 'LossTerm', 'RelatednessKL', 'StageOne', 'StageTwo', 'Teacher', 'UserError',
           'cached_features', 'category_block', 'category_dls', 'compare', 'create_backbone', 'embed', 'episode_block', 'episodic_dls',
           'evaluate', 'few_shot_data', 'get_preset', 'global_learner', 'grdd', 'known_features', 'load_network', 'meta_learner', 'muon',
           'plain_dl', 'plot_relatedness', 'plot_tsne', 'prepare', 'processes', 'register_classifier', 'relatedness', 'sample_episodes',
           'sgd', 'stage_one', 'stage_two', 'train_augmentation']
