/* The functions that may follow a convolution or a dense layer, by their number in the record of `activate`. */
#ifndef HL_ACTIVATE_H
#define HL_ACTIVATE_H
#include "simd.h"

#define activate_row HL(activate_row)
#define activate_rows HL(activate_rows)

/* y[i] = function(x[i]) for i < n; y may be x. */
void activate_row(int64_t function, int64_t n, const real *x, real *y);

/* y = function(y) for rows of n elements, `pitch` apart. Called on results that were just written, while the nearest
 * caches hold them: so no loop that writes results is compiled once for each function. */
void activate_rows(int64_t function, int64_t rows, int64_t n, real *y, int64_t pitch);
#endif
