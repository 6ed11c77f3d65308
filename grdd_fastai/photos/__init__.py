"""Classify photos, given a few labelled photos of each class."""
