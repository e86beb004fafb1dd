"""Splitveil's own engines, by their common interface; the variant is the engine's name."""

import numpy as np
from timed import Measured, job, report

from splitveil.private.core import LayerSpec
from splitveil.private.layer import public_half, publish
from splitveil.private.published import Publication

BATCH = 8
"""Masks are made for so many rows at a time, as the mask pool does."""

work, measured = job(), Measured()


def both_halves():
    """The served half, opened for this client, and the client's site."""
    specs = [LayerSpec(work.A, work.B, 1.0, (("layer", len(work.B)),))]
    served, publication = publish(specs, engine=work.variant)
    data = publication.to_bytes()
    half = public_half(Publication.from_bytes(data))
    keys = half.keys()
    measured.sizes = {"keys": len(keys), "published": len(data)}
    return served.opened(keys) if keys else served, half


served, half = measured.step("setup", both_halves)
site, q = half.site([0]), half.publication.layers[0].Q
row = work.x[None]
masks = []


def recover(pending, answer):
    (core,) = site.recover(pending, answer)
    return core if q is None else core @ q.T


def once():
    if site.mask_size == 0:
        masks[:] = site.make_masks(1)
    elif not masks:
        masks[:] = measured.step("offline", lambda: site.make_masks(BATCH), BATCH)
    mask = [masks.pop()]
    query, pending = measured.step("encrypt", lambda: site.query(row, mask))
    answer = measured.step("server", lambda: served.answer([0], 1, query))
    output = measured.step("decrypt", lambda: recover(pending, answer))
    measured.sizes |= {"up": len(query), "down": len(answer)}
    return np.asarray(output)


report(measured, measured.repeat(work.seconds, once), "splitveil")
