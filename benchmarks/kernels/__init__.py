"""Speed of the operators, shape by shape, beside what else computes the same and beside a plain copy."""
