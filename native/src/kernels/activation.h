// The gated activation, in fp32.
#pragma once

#include "kernels/inline.h"

// exp, within 2 units in the last place over the range whose result is normal. The argument is split as
// n ln 2 + r with ln 2 in two parts (Cody and Waite), |r| <= ln 2 / 2; the polynomial is the truncated
// Taylor series in r, whose first dropped term is r^8 / 8! < 6e-9. NaN passes through.
template <class Ops>
KTK_INLINE typename Ops::F exponential(typename Ops::F x) {
  typedef typename Ops::F F;
  // Beyond these the result is no normal fp32; arguments order so that a NaN in x is returned.
  x = Ops::min(Ops::set1_f(88.7f), Ops::max(Ops::set1_f(-87.3f), x));
  const typename Ops::I n = Ops::round_i(Ops::mul(x, Ops::set1_f(1.44269504f)));
  const F whole = Ops::from_i(n);
  F r = Ops::fma(whole, Ops::set1_f(-0.693359375f), x);
  r = Ops::fma(whole, Ops::set1_f(2.12194440e-4f), r);
  F y = Ops::set1_f(1.0f / 5040);
  y = Ops::fma(y, r, Ops::set1_f(1.0f / 720));
  y = Ops::fma(y, r, Ops::set1_f(1.0f / 120));
  y = Ops::fma(y, r, Ops::set1_f(1.0f / 24));
  y = Ops::fma(y, r, Ops::set1_f(1.0f / 6));
  y = Ops::fma(y, r, Ops::set1_f(0.5f));
  y = Ops::fma(y, r, Ops::set1_f(1.0f));
  y = Ops::fma(y, r, Ops::set1_f(1.0f));
  // 2^n in two factors: n reaches 128, one beyond the largest exponent.
  const typename Ops::I half = Ops::round_i(Ops::mul(whole, Ops::set1_f(0.5f)));
  const typename Ops::I rest = Ops::sub_i(n, half), bias = Ops::set1_i(127);
  y = Ops::mul(y, Ops::as_f(Ops::shift_left_i(Ops::add_i(half, bias), 23)));
  return Ops::mul(y, Ops::as_f(Ops::shift_left_i(Ops::add_i(rest, bias), 23)));
}

// silu(gate) * up; with limit > 0 gate is at most limit and up within +-limit; with alpha > 0
// gate * sigmoid(alpha * gate) * (up + 1), as GPT-OSS defines it.
template <class Ops>
KTK_INLINE typename Ops::F gated_activation(typename Ops::F gate, typename Ops::F up, float limit,
                                            float alpha) {
  if (limit > 0.0f) {
    const typename Ops::F most = Ops::set1_f(limit), least = Ops::set1_f(-limit);
    gate = Ops::min(most, gate);
    up = Ops::min(most, Ops::max(least, up));
  }
  const typename Ops::F one = Ops::set1_f(1.0f);
  const typename Ops::F slope = Ops::set1_f(alpha > 0.0f ? -alpha : -1.0f);
  const typename Ops::F swish = Ops::div(gate, Ops::add(one, exponential<Ops>(Ops::mul(gate, slope))));
  return Ops::mul(swish, alpha > 0.0f ? Ops::add(up, one) : up);
}
