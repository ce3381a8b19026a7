"""The error function on arrays, to double precision; NumPy has none.

Source: W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation
23 (1969), 631-637. Three ranges: |x| <= 0.46875, up to 4, and beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyllm.backend import current

NEAR_NUMERATOR = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
    3.20937758913846947e3,
)  # fmt: skip
NEAR_DENOMINATOR = (
    1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3,
)  # fmt: skip
MIDDLE_NUMERATOR = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3,
)  # fmt: skip
MIDDLE_DENOMINATOR = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)  # fmt: skip
FAR_NUMERATOR = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
    1.60837851487422766e-2, 6.58749161529837803e-4,
)  # fmt: skip
FAR_DENOMINATOR = (
    1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
    2.33520497626869185e-3,
)  # fmt: skip
INVERSE_SQRT_PI = 5.6418958354775628695e-1


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Horner's rule, highest power first."""
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def erf(x: Any) -> Any:
    """erf(x) element by element, in the dtype of x. x: (...) -> (...)."""
    xp = current.xp
    magnitude = xp.minimum(xp.absolute(x), 6.0)  # erf(6) rounds to 1
    near_square = xp.minimum(magnitude, 0.46875) ** 2
    near = x * _polynomial(NEAR_NUMERATOR, near_square) / _polynomial(NEAR_DENOMINATOR, near_square)
    middle_x = xp.clip(magnitude, 0.46875, 4.0)
    middle = xp.exp(-middle_x * middle_x) * (
        _polynomial(MIDDLE_NUMERATOR, middle_x) / _polynomial(MIDDLE_DENOMINATOR, middle_x)
    )
    far_x = xp.maximum(magnitude, 4.0)
    inverse_square = 1 / (far_x * far_x)
    far = (
        xp.exp(-far_x * far_x)
        / far_x
        * (
            INVERSE_SQRT_PI
            - inverse_square
            * _polynomial(FAR_NUMERATOR, inverse_square)
            / _polynomial(FAR_DENOMINATOR, inverse_square)
        )
    )
    complement = xp.where(magnitude <= 4.0, middle, far)
    return xp.where(magnitude <= 0.46875, near, xp.where(x < 0, complement - 1, 1 - complement))
