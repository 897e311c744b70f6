/* The functions of vmath.h on arrays, each as the kernels have it: for measuring how far they are from the truth. */
#include "vmath.h"

#define EACH(function) \
    for (int64_t i = 0; i < n; i += LANES) { \
        int64_t some = min64(n - i, LANES); \
        store_part(y + i, some, function(load_part(x + i, some, (real) - 1))); \
    } \
    return HL_OK

int HL(elementary)(const hl_elementary_plan *p, const real *x, real *y)
{
    int64_t n = p->N;
    switch (p->function) {
    case HL_EXP: EACH(vexp);
    case HL_EXP_BELOW: EACH(vexp_below);
    case HL_EXP2: EACH(vexp2);
    case HL_LOG: EACH(vlog);
    case HL_TANH: EACH(vtanh);
    case HL_SIGMOID: EACH(vsigmoid);
    case HL_ERF: EACH(verf);
    case HL_TANH_GATE: EACH(vtanh_gate);
    case HL_SIGMOID_GATE: EACH(vsigmoid_gate);
    default: return HL_INVALID;
    }
}
