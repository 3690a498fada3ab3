"""Placeholder until the bounds room is there."""

import torch


def shift(Q, s, iters=400, tol=1e-6):
    """Dual barrier; returns bound value, lam (d,),"""
    d = len(Q)
    dt = torch.float64
    sc = float(Q.diagonal().sum()) / d
    C = torch.zeros(d + 1, d + 1, dtype=dt)
    C[1:, 1:] = Q / sc
    n = torch.cat((torch.tensor([-float(s)]), torch.ones(d))).to(dt)
    V = torch.linalg.qr(torch.cat((n[:, None], torch.eye(d + 1, dtype=dt)), 1)).Q[:, 1 : d + 1]
    E0 = torch.zeros(d + 1, d + 1, dtype=dt)
    E0[0, 0] = 1

    def M(l, t):
        A = C.clone()
        A[1:, 1:] -= torch.diag(l)
        A[0, 1:] += l / 2
        A[1:, 0] += l / 2
        A[0, 0] -= t
        return V.T @ A @ V

    lmin = float(torch.linalg.eigvalsh(C[1:, 1:])[0])
    l = torch.full((d,), -1.0, dtype=dt)
    t = torch.tensor(-50.0 * d, dtype=dt)
    while torch.linalg.cholesky_ex(M(l, t)).info:
        t *= 4
    mu = 10.0
    best = None
    for it in range(iters):
        L = torch.linalg.cholesky(M(l, t))
        Mi = torch.cholesky_inverse(L)
        P = V @ Mi @ V.T
        ee = P[1:, 1:]
        e0 = P[0, 1:]
        p00 = P[0, 0]
        eu = ee - e0[:, None]  # P(e_i,u_j) = P_ij - P_i0
        uu = ee - e0[:, None] - e0[None, :] + p00
        H = 0.5 * (ee * uu + eu * eu.T)
        # with E0: tr(P A_i P E0) = e_i.. = P_0i*(P_0i-P_00)
        h = e0 * (e0 - p00)
        G = torch.zeros(d + 1, d + 1, dtype=dt)
        G[:d, :d] = H
        G[d, :d] = h
        G[:d, d] = h
        G[d, d] = p00**2
        gl = -(ee.diagonal() - e0)
        gt = -p00
        g = mu * torch.cat((gl, gt[None]))
        g[d] += 1
        step = torch.linalg.solve(G + 1e-14 * torch.eye(d + 1, dtype=dt) * G.diagonal().mean(), g / mu)
        dec = float(g @ step) / mu
        # longest step: M - a dM >= 0
        dM = M(step[:d], step[d]) - V.T @ C @ V
        Li = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=dt), upper=False)
        ev = torch.linalg.eigvalsh(Li @ dM @ Li.T)
        # maximise a*(step t)+mu*sum log(1+a ev)
        hi = 0.98 / max(1e-300, -float(ev[0])) if ev[0] < 0 else 1e6
        a = min(1.0, hi)
        lo_ = 0.0
        hi_ = hi
        for _ in range(50):
            mid = 0.5 * (lo_ + hi_)
            sl = float(step[d]) + mu * float((ev / (1 + mid * ev)).sum())
            if sl > 0:
                lo_ = mid
            else:
                hi_ = mid
        a = lo_
        l = l + a * step[:d]
        t = t + a * step[d]
        if dec < 1.0:
            if mu * d < tol:
                break
            mu *= 0.1
    return float(t) * sc, l * sc, it


def row_shift(problem, kept):
    w, g = problem.scaled_weight.double(), problem.scaled_gram.double()
    out = []
    for r in range(len(w)):
        q = w[r][:, None] * (g + g.T) / 2 * w[r]
        s = w.shape[1] - int(kept[r])
        if 0 < s < w.shape[1] and float(q.diagonal().sum()) > 0:
            try:
                out.append(shift(q, s)[1])
            except Exception:
                out.append(q.diagonal() * 0)
        else:
            out.append(q.diagonal() * 0)
    return torch.stack(out)
