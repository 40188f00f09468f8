"""Likelihood surrogates, one file each. A new one: a file, an import, a line in ESTIMATORS."""

from .base import Estimator as Estimator
from .base import Update as Update
from .coupled import coupled as coupled
from .elbo import elbo as elbo
from .espo import espo as espo
from .gauss import gauss as gauss
from .left_to_right import left_to_right as left_to_right
from .mean_field import mean_field as mean_field
from .sandwich import sandwich as sandwich
from .trajectory import trajectory as trajectory
from .two_mean_field import two_mean_field as two_mean_field
from .unigrpo import unigrpo as unigrpo

ESTIMATORS = {
    "coupled": coupled,
    "elbo": elbo,
    "espo": espo,
    "gauss": gauss,
    "left_to_right": left_to_right,
    "mean_field": mean_field,
    "sandwich": sandwich,
    "trajectory": trajectory,
    "two_mean_field": two_mean_field,
    "unigrpo": unigrpo,
}
