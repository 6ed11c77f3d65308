"""Tables, scores, published weights, reports and figures."""
