"""What the Learners of both stages share. Importing this package gives every Learner `fit_poly` and `fit_step`."""
from . import schedules  # noqa: F401
