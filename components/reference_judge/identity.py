"""Name and fingerprint of the reference judge; both say that it is rules, not a model."""

NAME = "layerloop-reference-judge"
FINE = f"{NAME}-fine"
VERSION = "3"  # raised when an answer to the same request changes
FINGERPRINT = f"rules-v{VERSION}, pixel rules of layerloop, not a vision-language model"
SCORE_RANGE = {NAME: 0.4, FINE: 1.0}  # model -> share of 0..5 that its scores of a single candidate span
