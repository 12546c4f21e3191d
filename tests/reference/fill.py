# ruff: noqa: E501
"""Deterministic weights for the reference cases, plus loaders and comparers.

Pure numpy + hashlib (torch only where a function says so).  No network weights are stored:
every tensor of a state dict is a function of (salt, key name, shape), so both sides of a
comparison build the very same float32 numbers from the official key names.

    salt  -> the name of the reference case, e.g. "det_base"
    u     -> uniform in (-1, 1): SHAKE-128 of  "detr-exam-v1|<salt>|<key>|<d0>x<d1>x..."
             read as little-endian uint32 k, then ((k + 0.5) / 2**31 - 1) in float64
    value -> one of the rules of `rule()` below, rounded once to float32

All steps are exact IEEE float64 operations (+, *, /, sqrt), so the result is bit-identical
on every platform and every numpy version.
"""
import hashlib
import json
import math
import os

import numpy as np

VERSION = "detr-exam-v1"
HERE = os.path.dirname(os.path.abspath(__file__))


def unit_uniform(salt, key, shape):
    """float64 array of `shape`, uniform in (-1, 1), a function of its arguments only."""
    shape = tuple(int(s) for s in shape)
    n = int(np.prod(shape, dtype=np.int64)) if shape else 1
    tag = "|".join([VERSION, salt, key, "x".join(map(str, shape))])
    raw = hashlib.shake_128(tag.encode("utf-8")).digest(4 * n)
    k = np.frombuffer(raw, dtype="<u4").astype(np.float64)
    return ((k + 0.5) / 2147483648.0 - 1.0).reshape(shape)


def rule(key, shape):
    """(offset, scale): the value is offset + scale * u.

    The gains are chosen so that random networks behave like trained ones where it matters for
    a comparison: tokens and queries stay different from one another through all layers (plain random
    post-norm stacks collapse to one vector), attention is peaked, boxes and classes vary.
    """
    leaf = key.rsplit(".", 1)[-1]
    owner = key.rsplit(".", 2)[-2] if key.count(".") >= 1 else ""
    s3 = math.sqrt(3.0)
    if leaf == "running_var":
        return 1.0, 0.5
    if leaf == "running_mean":
        return 0.0, 0.2
    if owner in ("row_embed", "col_embed"):
        return 0.5, 0.5                       # U(0, 1), as the official init
    if owner == "query_embed":
        return 0.0, 3.0 * s3                  # std 3 (official init: std 1)
    if len(shape) <= 1:
        if leaf == "weight":                  # batch, layer and group norms
            if owner == "bn3":
                return 0.3, 0.1               # last norm of a bottleneck: keeps R50/R101 tame
            return (0.75, 0.25) if "backbone" in key else (1.0, 0.3)
        return 0.0, 0.1                       # biases
    fan_in = 1
    for d in shape[1:]:
        fan_in *= int(d)
    gain = 1.0
    if len(shape) == 4 and "input_proj" not in key:
        gain = math.sqrt(2.0)                 # convolutions followed by relu
    if "class_embed" in key:
        gain = 2.0
    elif "bbox_embed.layers" in key:
        gain = 1.6
    elif leaf == "in_proj_weight":
        gain = 2.5                            # the value rows are scaled by 0.4 in fill_array
    elif owner == "out_proj":
        gain = 0.3 if "encoder" in key else (2.0 if "multihead_attn" in key else 0.5)
    elif owner == "linear2":
        gain = 0.3 if "encoder" in key else 0.5
    return 0.0, gain * s3 / math.sqrt(fan_in)


def fill_array(salt, key, shape):
    """float32 numpy array for one state-dict entry."""
    shape = tuple(int(s) for s in shape)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    off, scale = rule(key, shape)
    a = off + scale * unit_uniform(salt, key, shape)
    if key.endswith("in_proj_weight"):        # rows: q, k, v; v down to gain 1
        a[2 * shape[1]:] *= 0.4
    return a.astype(np.float32)


def fill_state_dict(keys_shapes, salt):
    """Ordered dict key -> float32 array, from an iterable of (key, shape)."""
    return {k: fill_array(salt, k, tuple(s)) for k, s in keys_shapes}


def fill_torch_module(module, salt, rename=None):
    """Fill every entry of module.state_dict() in place (torch needed).

    rename: a function (own key -> official key), for an implementation that names its
    parameters otherwise and whose tensors have the official shapes.  An entry for which it
    returns None is left alone.
    """
    import torch
    sd = module.state_dict()
    with torch.no_grad():
        for k, t in sd.items():
            ok = rename(k) if rename else k
            if ok is None:
                continue
            t.copy_(torch.from_numpy(np.ascontiguousarray(fill_array(salt, ok, tuple(t.shape)))))
    return module


def projection(salt, key, array):
    """Dot product of an array (a gradient, say) with a fixed +-1-range direction.

    Together with the norm this pins a gradient down: a transposed, permuted or sign-flipped
    gradient keeps its norm and loses its projection.
    """
    a = np.asarray(array, dtype=np.float64)
    return float((a * unit_uniform("proj|" + salt, key, a.shape)).sum())


# ------------------------------------------------------------------ loaders

def load_npz(name):
    """dict of arrays of <name>.npz in this folder ('/' in a key marks nesting)."""
    with np.load(os.path.join(HERE, name + ".npz"), allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


def load_json(name):
    with open(os.path.join(HERE, name + ".json"), encoding="utf-8") as f:
        return json.load(f)


def subtree(arrays, prefix):
    """Entries under 'prefix/', with the prefix taken off."""
    p = prefix.rstrip("/") + "/"
    return {k[len(p):]: v for k, v in arrays.items() if k.startswith(p)}


def compare(name, got, want, rtol=1e-4, atol=1e-5):
    """None if equal within tolerance, otherwise one line that says how far off."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return f"{name}: shape {got.shape}, expected {want.shape}"
    if want.dtype.kind in "biuSU":
        bad = int((got != want).sum())
        return f"{name}: {bad} of {want.size} entries differ" if bad else None
    g, w = got.astype(np.float64), want.astype(np.float64)
    nan = np.isnan(g) != np.isnan(w)
    err = np.where(np.isnan(w) & np.isnan(g), 0.0, np.abs(g - w))
    lim = atol + rtol * np.abs(w)
    if nan.any() or np.asarray(err > lim)[~np.isnan(w)].any():
        i = int(np.nanargmax(np.where(np.isnan(err), np.inf, err)))
        return (f"{name}: max abs diff {np.nanmax(err):.3g} (want {w.flat[i]:.6g}, got {g.flat[i]:.6g}), "
                f"{int((err > lim).sum())} of {w.size} beyond rtol {rtol} atol {atol}")
    return None


# ------------------------------------------------------------------ one-call checks

TOLERANCE = {"pred_logits": 2e-4, "pred_boxes": 2e-5, "pred_masks": 1e-4}


def _np(x):
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def check_outputs(case, out, float64=False):
    """Compare a model's output dict (official names: pred_logits, pred_boxes, pred_masks,
    aux_outputs) with the stored one; returns a list of complaints, empty if all is well."""
    z, bad = load_npz(case), []
    pre = "float64/" if float64 else ""
    for k, atol in TOLERANCE.items():
        if pre + k in z:
            bad.append(compare(f"{case} {pre}{k}", _np(out[k]), z[pre + k], rtol=0, atol=1e-5 if float64 else atol)
                       if k in out else f"{case}: no {k}")
    if not float64:
        n = len({k.split("/")[1] for k in z if k.startswith("aux/")})
        aux = out.get("aux_outputs", [])
        if len(aux) != n:
            bad.append(f"{case}: {len(aux)} auxiliary outputs, expected {n}")
        for i, a in enumerate(aux[:n]):
            for k in ("pred_logits", "pred_boxes"):
                bad.append(compare(f"{case} aux {i} {k}", _np(a[k]), z[f"aux/{i}/{k}"], rtol=0, atol=TOLERANCE[k]))
    return [b for b in bad if b]


def check_losses(case, losses, total=None, float64=False):
    """Compare a loss dict (unweighted, official names, floats) and the weighted total."""
    m, bad = load_json(case), []
    want = m["float64_loss_dict" if float64 else "loss_dict"]
    rtol = 1e-6 if float64 else 1e-4
    for k, w in want.items():
        if k not in losses:
            bad.append(f"{case}: no {k}")
        else:
            bad.append(compare(f"{case} {k}", float(losses[k]), w, rtol=rtol, atol=rtol))
    if total is not None:
        bad.append(compare(f"{case} total", float(total), m["float64_total" if float64 else "total"], rtol=rtol, atol=rtol))
    return [b for b in bad if b]


def check_gradients(case, grads, float64=True, rtol=None):
    """grads: official parameter name -> gradient array (None or missing: no gradient)."""
    m, bad = load_json(case), []
    want = m["float64_grad" if float64 else "grad"]
    rtol = rtol or (1e-4 if float64 else 3e-2)
    floor = 1e-6 * m["grad_total_norm"] if "grad_total_norm" in m else 1e-6
    for k in sorted(set(want) | {k for k, g in grads.items() if g is not None}):
        if k not in want:
            bad.append(f"{case}: {k} has a gradient and should be frozen")
        elif grads.get(k) is None:
            bad.append(f"{case}: {k} has no gradient")
        else:
            g, (norm, proj) = _np(grads[k]), want[k]
            e = max(abs(float(np.linalg.norm(g.astype(np.float64))) - norm), abs(projection(m["salt"], k, g) - proj))
            if e > rtol * norm + floor:
                bad.append(f"{case}: gradient of {k} off by {e:.3g} (norm {norm:.3g})")
    return bad


def check_matching(case, layer, indices):
    """indices: list over images of (query, target); layer: "final", "0", "1" ..."""
    z, bad = load_npz(case), []
    for b, (q, t) in enumerate(indices):
        q, t = _np(q), _np(t)
        o = np.argsort(q)
        for n, x in (("query", q[o]), ("target", t[o])):
            bad.append(compare(f"{case} match {layer} image {b} {n}", x.astype(np.int64), z[f"match/{layer}/{b}/{n}"]))
    return [b for b in bad if b]
