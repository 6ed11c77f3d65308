"""Experiments: tables, scores, published weights, reports and figures."""
