"""Options that several programs share: the data that they read, and how they compute."""
from dataclasses import dataclass
from typing import Annotated

from ..core.distributed import log
from ..data.cache import few_shot_data
from ..data.class_lists import CLASS_LISTS
from ..data.images import RESAMPLING
from ..settings import Settings, one_of

__all__ = ['DataOptions', 'ComputeOptions', 'Compile']


# type of the parameter `compile` of a program, with its help
Compile = Annotated[bool, 'compile the networks with torch.compile, which is slower on a CPU']


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    "The data set to read, and the folder for its decoded images"
    data: Annotated[str|None, 'raw data set in any layout of data/README.md (default: fetch CIFAR-FS)'] = None
    cache: Annotated[str|None, "folder for decoded images and features (default: grdd_fastai in the user's cache folder)"] = None
    allow_large: Annotated[bool, 'also decode photos of 90 to 179 megapixels'] = False
    split: Annotated[str|None, f'list that splits the data in place of its own splits: {", ".join(CLASS_LISTS)}, or the path of a CSV or a '
                               'folder of CSVs'] = None
    resize: Annotated[str, 'how images become squares: fit (resize, then cut out the centre), squash, or crop92 or squash92 (resize to 92, '
                           'then cut out the centre); another number works, too'] = 'fit'
    interpolation: Annotated[str, 'how images are resized', one_of(*RESAMPLING)] = 'bicubic'

    def load(self, px, demo=False, seed=0):
        "Load the `FewShotData` at `px` pixels; with `demo` it is the embedded data set unless `data` is given"
        return few_shot_data('demo' if demo and self.data is None else self.data, px, self.cache, seed, self.allow_large, self.split,
                             self.resize, self.interpolation)

    def identity(self):
        "What a run of other data differs in: the data set, and how it is split and resized where that is not as usual"
        usual = DataOptions()
        return dict(data=self.data) | {k:v for k in ('split', 'resize', 'interpolation') if (v := getattr(self, k)) != getattr(usual, k)}

    def warn_of_demo(self, demo):
        "Say loudly what is no result about GRDD: the small settings of a demo, and drawn characters"
        drawn = self.data == 'demo' or (demo and self.data is None)
        what = ' on '.join([*(['small settings'] if demo else []), *(['drawn characters'] if drawn else [])])
        if what: log(f'*** DEMO: {what}; not a result about GRDD ***')


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Settings):
    "Precision, memory format and kernels of the networks"
    fp32: Annotated[bool, 'compute in float32 instead of bfloat16 or float16'] = False
    channels_last: Annotated[bool, 'channels_last memory format of the convolutions'] = True
    compile: Compile = False
    deterministic: Annotated[bool, 'deterministic CUDA kernels, so that runs can be repeated and resumed bit for bit, as on a CPU'] = False

    def for_learner(self):
        "The options as keywords of `few_shot_learner`"
        return dict(amp=not self.fp32, channels_last=self.channels_last, compile=self.compile)
