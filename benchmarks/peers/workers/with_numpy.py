"""Plaintext: what the server does when it may see x."""

from timed import Measured, job, report

work, measured = job(), Measured()
measured.sizes = {"up": work.x.nbytes, "down": 4 * len(work.B)}
report(
    measured,
    measured.repeat(work.seconds / 4, lambda: measured.step("server", lambda: work.B @ (work.A @ work.x))),
    "numpy",
)
