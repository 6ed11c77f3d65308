"""What the Learners of both stages have in common; importing this package gives every Learner `fit_poly` and `fit_step`."""
from . import schedules  # noqa: F401
