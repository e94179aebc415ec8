"""The numbers of request groups, one range for each asker: no two groups of a run share a number.

Training counts from 0.
"""

EVALUATION = 1 << 40
PROBE = 1 << 41  # of weights that were just sent
PAIRS = 1 << 42  # of a data source, with a stride of its own for each
PAIRS_STRIDE = 1 << 36
CHECK_STRIDE = 1 << 20  # `tandem check-logprobs` trains nothing: version v counts from v times this
