"""Branch-Train-MiX on Megatron-core.

The words of the project. A *seed* model is copied; each copy is trained alone on one *domain* (*branch*, *train*) and
becomes an *expert*; the seed itself may join as the *generalist*. *Mixing* stacks the experts' feed-forward blocks as
the experts of a mixture and averages everything else; *finetuning* then teaches the *router* which token goes where.
"""

__version__ = "0.1.0"
