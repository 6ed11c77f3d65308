"""Options that several programs share: the data they read, and how they compute."""
from dataclasses import dataclass
from typing import Annotated

from ..data.cache import few_shot_data
from ..settings import Settings

__all__ = ['DataOptions', 'ComputeOptions']


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    "Which data set is read, and where its decoded images are kept"
    data: Annotated[str|None, 'raw data set in any layout of data/README.md (default: fetch CIFAR-FS)'] = None
    cache: Annotated[str|None, "folder for decoded images and features (default: grdd_fastai in the user's cache folder)"] = None
    allow_large: Annotated[bool, 'also decode photos of 90 to 179 megapixels'] = False

    def load(self, px, demo=False, seed=0):
        "The `FewShotData` at `px` pixels; with `demo` the embedded data set, unless `data` is given"
        return few_shot_data('demo' if demo and self.data is None else self.data, px, self.cache, seed, self.allow_large)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Settings):
    "How the networks are computed"
    fp32: Annotated[bool, 'compute in float32 instead of bfloat16 or float16'] = False
    channels_last: Annotated[bool, 'channels_last memory format'] = True
    compile: Annotated[bool, 'compile the networks by torch.compile, which is slower on a CPU'] = False
    deterministic: Annotated[bool, 'deterministic CUDA kernels, to repeat and resume a run to the bit; a CPU is deterministic anyway'] = False

    def for_learner(self): return dict(amp=not self.fp32, channels_last=self.channels_last, compile=self.compile)
