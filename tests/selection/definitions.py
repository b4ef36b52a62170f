"""Rules with attention of their own as dense attention: which pairs each sees, and by what weight.

Only the choice is asked of the rule; its attention is written again over all pairs, in jnp, so that
it has gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.selection import hyper, moba, pbs
from tests.selection import rules, test_spatial

jit = functools.partial(jax.jit, compiler_options=rules.COMPILER_OPTIONS)


def of(rule, q, k, v):
    """What `rule.attend` must compute after its choice for q, k and v: a function of such."""
    name = type(rule).__module__.rsplit(".", 1)[-1]
    return globals()[f"of_{name}"](rule, q, k, v)


def logits(q, k):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    return jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5


def weights(z, seen, bias=0.0):
    """A softmax over what is `seen [.., T, S]`; rows that see nothing are 0."""
    z = jnp.where(seen, z + bias, -1e30)
    x = jnp.where(seen, jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True))), 0)
    return x / jnp.maximum(x.sum(-1, keepdims=True), 1e-30)


def mixed(p, v):
    return jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, p.shape[1] // v.shape[2], 2))


def dense(q, k, v, seen, bias=0.0):
    return mixed(weights(logits(q, k), seen, bias), v)


def earlier(q, k):
    return np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None]


def listed(lists, count):
    """Lists `[B, T, N, m]` as bool `[B, N, T, count]`."""
    return np.moveaxis((np.asarray(lists)[..., None] == np.arange(count)).any(3), 2, 1)


def by_place(mask, batch, q_len, kv_len):
    """Blocks `[B, N, T, S]` of a mask of folded heads, at the places of moved tokens."""
    kept = rules.states(mask)[:, 0] > 0
    at = np.arange(q_len) // mask.block_q, np.arange(kv_len) // mask.block_kv
    return kept[:, at[0]][:, :, at[1]].reshape(batch, -1, q_len, kv_len)


def back(places, q_order=None, kv_order=None):
    """What is seen at places, by token: `order[.., i]` is the token at place i."""
    for order, axis in ((q_order, 2), (kv_order, 3)):
        if order is not None:
            inverse = np.argsort(np.asarray(order), -1)
            places = np.take_along_axis(places, np.expand_dims(inverse, 5 - axis), axis)
    return places


def of_dhsa(rule, q, k, v):
    seen = listed(jit(rule.lists)(q, k), k.shape[1])
    return lambda q, k, v: dense(q, k, v, seen)


def of_mm_inference(rule, q, k, v):
    stride, phase = (np.asarray(x)[..., None, None] for x in jit(rule.grid)(q, k))
    at = np.arange(k.shape[1])
    seen = (at - phase) % stride == 0
    seen = (seen | rule.always.mask_fn(np.arange(q.shape[1])[:, None], at)) & earlier(q, k)
    return lambda q, k, v: dense(q, k, v, seen)


def of_pbs(rule, q, k, v):
    order = jit(rule.key_order)(q, k)
    mask = rules.select(rule.blocks_rule, pbs.fold(q), pbs.moved(k, order, q.shape[2]))
    segment = [np.arange(x.shape[1]) // rule.segment for x in (q, k)]
    same = segment[0][:, None] == segment[1]
    far = by_place(mask, q.shape[0], q.shape[1], k.shape[1])
    seen = (back(far, kv_order=order) & ~same | same) & earlier(q, k)
    return lambda q, k, v: dense(q, k, v, seen)


def of_svg2(rule, q, k, v):
    q_order, kv_order, mask, _ = jit(rule.plan)(q, k)
    seen = back(by_place(mask, q.shape[0], q.shape[1], k.shape[1]), q_order, kv_order)
    return lambda q, k, v: dense(q, k, v, seen)


def of_hyper(rule, q, k, v):
    """Keys of the own block count once, others as often as they are drawn, times their weight."""

    def rectangle(q, k, key):
        for_planes, for_samples = jax.random.split(key)
        planes = jax.random.normal(for_planes, (rule.planes, q.shape[3]))
        orders = (
            hyper.lsh_order(x, planes) for x in (q, jnp.repeat(k, q.shape[2] // k.shape[2], 2))
        )
        q_len, kv_len = q.shape[1], k.shape[1]
        places = np.arange(q_len) * kv_len // q_len, np.arange(kv_len)
        same = places[0][:, None] // rule.block_q == places[1] // rule.block_kv
        drawn = jax.random.randint(for_samples, (rule.samples,), 0, kv_len)
        times = np.bincount(np.asarray(drawn), minlength=kv_len) * kv_len / rule.samples
        found = np.where(same, 1.0, times)
        return back(np.broadcast_to(found, (*q.shape[:3:2], q_len, kv_len)), *orders)

    def triangle(q, k, key):
        length, middle = q.shape[1], q.shape[1] // 2
        if length <= rule.least:
            return np.broadcast_to(np.tri(length), (*q.shape[:3:2], length, length))
        keys = jax.random.split(key, 3)
        first, second = (
            triangle(q[:, part], k[:, part], key)
            for part, key in zip((slice(middle), slice(middle, None)), keys)
        )
        corner = rectangle(q[:, middle:], k[:, :middle], keys[2])
        top = np.concatenate([first, np.zeros((*first.shape[:3], length - middle))], 3)
        return np.concatenate([top, np.concatenate([corner, second], 3)], 2)

    times = triangle(q, k, jax.random.key(rule.seed))
    bias = np.log(np.where(times > 0, times, 1)).astype(np.float32)
    return lambda q, k, v: dense(q, k, v, times > 0, bias)


def centroids(q, count=3):
    x = np.random.default_rng(7).standard_normal((q.shape[2], count, q.shape[3]))
    return jnp.asarray(x, jnp.float32)


def of_routing(rule, q, k, v):
    """The mean over the clusters that take a query."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    q_in, kv_in = (  # bool [B, N, C, T]
        (np.asarray(jit(rule.members)(x, centroids(q)))[..., None] == np.arange(x.shape[1]))
        .any(3) for x in (q, k)
    )  # fmt: skip

    def on_sphere(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True))

    def attend(q, k, v):
        total = 0
        for c in range(q_in.shape[2]):
            seen = q_in[:, :, c, :, None] & kv_in[:, :, c, None] & earlier(q, k)
            total = total + dense(on_sphere(q), on_sphere(k), v, seen)
        return total / jnp.asarray(np.maximum(np.moveaxis(q_in.sum(2), 1, 2), 1)[..., None])

    return attend


def of_landmark(rule, q, k, v):
    """Inside blocks, and over the blocks that are read."""
    size, length = rule.block_kv, k.shape[1]
    block, regular = np.arange(length) // size, np.arange(length) % size != size - 1
    taken = listed(jit(rule.lists)(q, k), -(-length // size))[..., block]
    own = block[:, None] == block
    gate, near = (taken & ~own & ~regular & earlier(q, k)), own & regular & earlier(q, k)
    inner = taken & ~own & regular & earlier(q, k)

    def attend(q, k, v):
        z = logits(q, k)
        outer = weights(z, near | gate)
        p = jnp.where(near, outer, 0)
        for j in range(length // size):
            mark = outer[..., j * size + size - 1, None] * gate[..., j * size + size - 1, None]
            p = p + mark * weights(z, inner & (block == j))
        return mixed(p, v)

    return attend


def of_dynamic_mask(rule, q, k, v):
    params = rules.params(rule, q, k)

    def scores(v):
        return params["decay"] * jnp.logaddexp(jnp.einsum("bskh,khm->bsm", v, params["step"]), 0)

    group, found = q.shape[2] // k.shape[2], np.moveaxis(np.asarray(scores(v)), 2, 1)
    ranked = np.where(earlier(q, k), found[:, :, None], -np.inf)
    place = np.argsort(np.argsort(-ranked, -1, kind="stable"), -1)
    seen = ((place < rule.top_k) & earlier(q, k)).repeat(group, 1)

    def attend(q, k, v):
        bias = jnp.repeat(jnp.moveaxis(scores(v), 2, 1), group, 1)[:, :, None]
        return dense(q, k, v, seen, bias)

    return attend


def coords(rule, q):
    """Distinct voxels, the same in each row."""
    side = rule.resolution
    places = np.random.default_rng(0).permutation(side**3)[: q.shape[1]]
    return np.stack(np.unravel_index(places, (side,) * 3), -1).astype(np.int32)


def of_spatial(rule, q, k, v):
    at = coords(rule, q)
    seen = [np.stack(x) for x in zip(*(test_spatial.masks(rule, *x, at) for x in zip(q, k)))]
    cube = np.unique(at // rule.edge, axis=0, return_inverse=True)[1]
    member = (cube == np.arange(cube.max() + 1)[:, None]).astype(np.float32)
    member /= member.sum(1, keepdims=True)

    def attend(q, k, v):
        means = (jnp.einsum("ms,bskh->bmkh", member, x) for x in (k, v))
        return dense(q, *means, True) + sum(dense(q, k, v, x) for x in seen)

    return attend


def of_psa(rule, q, k, v):
    """One softmax over the keys of all levels, those of 2 ** level keys with its logarithm."""
    (batch, q_len), kv_len = q.shape[:2], k.shape[1]
    blocks = rule._blocks(rule._states(q_len, kv_len), q, k, None, None)
    levels = np.asarray(jit(rule.levels)(q, k, blocks))
    levels = levels.repeat(rule.block_q, 2)[:, :, :q_len]
    seen, bias = [], []
    for level in range(len(rule.counts)):
        size = 2**level
        found = levels.repeat(rule.block_kv // size, 3)[..., : kv_len // size] == level
        seen.append(found & earlier(q, k) if level == 0 else found)
        bias.append(np.full(kv_len // size, np.log(size), np.float32))

    def pools(x, size):
        return x[:, : kv_len // size * size].reshape(batch, -1, size, *x.shape[2:]).mean(2)

    def attend(q, k, v):
        k, v = (jnp.concatenate([pools(x, 2**i) for i in range(len(seen))], 1) for x in (k, v))
        return dense(q, k, v, np.concatenate(seen, 3), np.concatenate(bias))

    return attend


def of_moba_conv(rule, q, k, v):
    taps = rules.params(rule, q, k)["key_conv"]

    def mix(k):
        moved = [jnp.pad(k, ((0, 0), (i, 0), (0, 0), (0, 0)))[:, : k.shape[1]] for i in range(3)]
        x = sum(x * taps[:, i] for i, x in enumerate(moved))
        return k + x / (1 + jnp.exp(-x))

    plain = moba.Moba(block_kv=rule.block_kv, top_k=rule.top_k)
    seen = rules.visible(plain, rules.chosen(plain, q, mix(k)), q.shape[1], k.shape[1])
    return lambda q, k, v: dense(q, mix(k), v, seen)
