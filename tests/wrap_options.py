"""Options as wrap() would check them, from those that differ from its defaults."""

import inspect

from gradsurg.optimizer.options import check_options
from gradsurg.optimizer.wrap import wrap

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(wrap).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "model"
}


def options_from(given, optimizers):
    return check_options(optimizers, {**DEFAULTS, **given})
