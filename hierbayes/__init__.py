from hierbayes.tasks import Tasks
from hierbayes.model import HierarchicalModel
from hierbayes.priors import HyperPrior
from hierbayes import likelihoods, priors
from hierbayes.formula import from_formula
from hierbayes.meta import *
