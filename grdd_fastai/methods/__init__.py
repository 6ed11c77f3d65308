"""Other methods of few-shot learning, each as its equations, in the same Learners and on the same episodes."""
