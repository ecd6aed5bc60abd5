"""Inception score: how sure a classifier is of each sample, and how even the classes are.

    exp(E KL(p(y|x) ‖ p(y))),  from 1 to the number of classes

Salimans et al. 2016, "Improved techniques for training GANs", section 4. They average it over ten
parts of the samples; here all samples are one, which has less bias. It is called so only when the
classifier is Inception; it says nothing of the variety within a class.
"""

import math

import torch
from torch import Tensor

from pipeline.evaluation.estimate import Estimate, mean_of


def class_score(log_probs: Tensor) -> Estimate:
    """Of the classifier's log-probabilities (N, classes).

    The error is that of the mean divergence, to first order: what an image does to p(y) is of
    second.
    """
    log_probs = log_probs.double()
    log_marginal = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    divergence = mean_of((log_probs.exp() * (log_probs - log_marginal)).sum(1))
    score = math.exp(divergence.value)
    return Estimate(score, score * divergence.error)
