r"""M: what all tasks together say about the prior.

.. math:: M(D_1, \dots, D_J) \to \varphi

Every method is an evidence, an adaptation and a way to read φ: maximise the summed evidence
(:func:`empirical_bayes`, :func:`maml`, :func:`imaml`), integrate over φ (:func:`full_bayes`),
follow a direction that maximises nothing (:func:`reptile`), or take a limit of the prior
(:func:`no_pooling`, :func:`complete_pooling`). Networks alone have :func:`llama` and :func:`abml`;
:func:`nuts` and :func:`implied_posterior` give posteriors of weights under a φ learned otherwise.
"""

from hierbayes.fit.method import Method
from hierbayes.meta.abml import Abml, abml
from hierbayes.meta.baselines import CompletePooling, NoPooling, complete_pooling, no_pooling
from hierbayes.meta.empirical_bayes import EmpiricalBayes, empirical_bayes
from hierbayes.meta.full_bayes import FullBayes, full_bayes
from hierbayes.meta.imaml import Imaml, imaml
from hierbayes.meta.implied import implied_posterior
from hierbayes.meta.learner import Learner
from hierbayes.meta.llama import Llama, llama
from hierbayes.meta.loading import load
from hierbayes.meta.maml import Maml, maml
from hierbayes.meta.outer_loop import Training
from hierbayes.meta.reptile import Reptile, reptile
from hierbayes.meta.weights_posterior import nuts

__all__ = [
    "Abml",
    "CompletePooling",
    "EmpiricalBayes",
    "FullBayes",
    "Imaml",
    "Learner",
    "Llama",
    "Maml",
    "Method",
    "NoPooling",
    "Reptile",
    "Training",
    "abml",
    "complete_pooling",
    "empirical_bayes",
    "full_bayes",
    "imaml",
    "implied_posterior",
    "llama",
    "load",
    "maml",
    "no_pooling",
    "nuts",
    "reptile",
]
