"""From a few photos of each class to a classifier of photos."""
