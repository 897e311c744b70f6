/* The C interface of hotloops.
 *
 * Every kernel is `int hl_<kernel>_<f32|f64>(const hl_<kernel>_plan *plan, arrays...)`: the plan holds the sizes in the
 * order in which the kernel's record names them (kernels/reference), then its scalars, then the strides of arrays that
 * may be views (marked ~ there); the others are contiguous in C order. All are aligned and valid, inputs before outputs;
 * an optional array may be NULL. A kernel checks nothing but what depends on data. It returns HL_OK, HL_NOMEM (no scratch
 * memory; outputs undefined), HL_INTERRUPTED (Ctrl-C; outputs undefined), HL_INVALID (data out of range, as the kernel
 * states) or HL_MISALIGNED (an array does not begin at a multiple of its element size; nothing ran). Callable from any
 * thread and after fork.
 *
 * What stands between the two markers is read by cffi: plain declarations and integer #defines only. */
#ifndef HOTLOOPS_H
#define HOTLOOPS_H
#include <stddef.h>
#include <stdint.h>
/* cffi:begin */
#define HL_OK 0
#define HL_INVALID 1
#define HL_NOMEM 2
#define HL_INTERRUPTED 3
#define HL_MISALIGNED 4

const char *hl_isa_name(void);        /* the instruction set in use */
const char *hl_isa_list(int i);       /* the i-th set that this CPU can run, from the lowest; NULL past the last */
int hl_isa_select(const char *name);  /* NULL: the best; HL_INVALID when this CPU cannot run it */
int hl_num_threads(int n);            /* sets the threads of the pool when n > 0; returns the number in force */
const char *hl_algorithm(void); /* what the last kernel on this thread picked, then forgets it; "" when nothing */

/* 64-byte aligned memory from a cache of blocks, for scratch and for large results: a call that repeats does not pay for
 * fresh pages. NULL when there is none. From any thread; hl_give(NULL) does nothing. */
void *hl_take(size_t bytes);
void hl_give(void *block);
void hl_keep(size_t bytes); /* how much the cache may hold while nobody uses it; 0 empties it */

/* Weights that do not change until hl_unprepack: the kernels that take an array at this address as their weights keep what
 * they make of it (panels, transforms) for their next call. Each hl_prepack that returned HL_OK, not HL_NOMEM, needs one
 * hl_unprepack; at the last no kernel may be reading them. */
int hl_prepack(const void *weights);
void hl_unprepack(const void *weights);
size_t hl_prepacked_bytes(const void *weights); /* that are kept */

/* ---- activation ---- */

/* y = exp(x - max) / sum(exp(x - max)) over the middle axis. */
typedef struct { int64_t M, K, I; } hl_softmax_plan;
int hl_softmax_f32(const hl_softmax_plan *plan, const float *x, float *y);
int hl_softmax_f64(const hl_softmax_plan *plan, const double *x, double *y);

/* y = x - max - log(sum(exp(x - max))) over the middle axis. */
typedef struct { int64_t M, K, I; } hl_log_softmax_plan;
int hl_log_softmax_f32(const hl_log_softmax_plan *plan, const float *x, float *y);
int hl_log_softmax_f64(const hl_log_softmax_plan *plan, const double *x, double *y);

/* y[M,I] = log(sum(exp(x))) over the middle axis. */
typedef struct { int64_t M, K, I; } hl_logsumexp_plan;
int hl_logsumexp_f32(const hl_logsumexp_plan *plan, const float *x, float *y);
int hl_logsumexp_f64(const hl_logsumexp_plan *plan, const double *x, double *y);

/* gx = y (gy - sum(gy y)), y the result of softmax. */
typedef struct { int64_t M, K, I; } hl_softmax_backward_plan;
int hl_softmax_backward_f32(const hl_softmax_backward_plan *plan, const float *gy, const float *y, float *gx);
int hl_softmax_backward_f64(const hl_softmax_backward_plan *plan, const double *gy, const double *y, double *gx);

/* gx = gy - exp(y) sum(gy), y the result of log_softmax. */
typedef struct { int64_t M, K, I; } hl_log_softmax_backward_plan;
int hl_log_softmax_backward_f32(const hl_log_softmax_backward_plan *plan, const float *gy, const float *y, float *gx);
int hl_log_softmax_backward_f64(const hl_log_softmax_backward_plan *plan, const double *gy, const double *y,
                                double *gx);

/* gx = gy exp(x - y), y[M,I] the result of logsumexp. */
typedef struct { int64_t M, I, K; } hl_logsumexp_backward_plan;
int hl_logsumexp_backward_f32(const hl_logsumexp_backward_plan *plan, const float *gy, const float *x, const float *y,
                              float *gx);
int hl_logsumexp_backward_f64(const hl_logsumexp_backward_plan *plan, const double *gy, const double *x,
                              const double *y, double *gx);

/* y = the function of that number: 0 x itself, 1 relu, 2 relu6, 3 sigmoid, 4 tanh, 5 silu, 6 gelu (with erf). */
typedef struct { int64_t N, function; } hl_activate_plan;
int hl_activate_f32(const hl_activate_plan *plan, const float *x, float *y);
int hl_activate_f64(const hl_activate_plan *plan, const double *x, double *y);

/* gx = gy times its derivative at x. */
typedef struct { int64_t N, function; } hl_activate_backward_plan;
int hl_activate_backward_f32(const hl_activate_backward_plan *plan, const float *x, const float *gy, float *gx);
int hl_activate_backward_f64(const hl_activate_backward_plan *plan, const double *x, const double *gy, double *gx);

/* ---- attention ---- */

/* Elements from one batch, head or row of an array [B,H,L,D] to the next; its last axis lies side by side. */
typedef struct { int64_t batch, head, row; } hl_strides;

/* y = softmax(softcap tanh(q k^T scale / softcap) + bias) v, and the logarithms of the softmax' denominators. bias or allowed
 * may be NULL, softcap and drop may be 0. Key s is hidden from query l unless l - left <= s <= l + right. */
typedef struct {
    int64_t B, H, L, D, G, S, E, MB, MH, ML;
    double scale, softcap;
    int64_t left, right, drop;
    double keep_scale;
    int64_t seed;
    hl_strides q, k, v, y;
} hl_attention_plan;
int hl_attention_f32(const hl_attention_plan *plan, const float *q, const float *k, const float *v, const float *bias,
                     const uint8_t *allowed, float *y, float *lse);
int hl_attention_f64(const hl_attention_plan *plan, const double *q, const double *k, const double *v,
                     const double *bias, const uint8_t *allowed, double *y, double *lse);

/* w[B,H,L,S]: what the values are multiplied with, before dropout. */
typedef struct {
    int64_t B, H, L, D, G, S, MB, MH, ML;
    double scale, softcap;
    int64_t left, right;
} hl_attention_weights_plan;
int hl_attention_weights_f32(const hl_attention_weights_plan *plan, const float *q, const float *k, const float *bias,
                             const uint8_t *allowed, const float *lse, float *w);
int hl_attention_weights_f64(const hl_attention_weights_plan *plan, const double *q, const double *k,
                             const double *bias, const uint8_t *allowed, const double *lse, double *w);

/* The gradients of attention by q, k and v. */
typedef struct {
    int64_t B, H, L, D, G, S, E, MB, MH, ML;
    double scale, softcap;
    int64_t left, right, drop;
    double keep_scale;
    int64_t seed;
} hl_attention_backward_plan;
int hl_attention_backward_f32(const hl_attention_backward_plan *plan, const float *q, const float *k, const float *v,
                              const float *bias, const uint8_t *allowed, const float *y, const float *lse,
                              const float *gy, float *gq, float *gk, float *gv);
int hl_attention_backward_f64(const hl_attention_backward_plan *plan, const double *q, const double *k, const double *v,
                              const double *bias, const uint8_t *allowed, const double *y, const double *lse,
                              const double *gy, double *gq, double *gk, double *gv);

/* The gradient of attention by its bias. */
typedef struct {
    int64_t B, H, L, D, G, S, E, MB, MH, ML;
    double scale, softcap;
    int64_t left, right, drop;
    double keep_scale;
    int64_t seed;
} hl_attention_grad_bias_plan;
int hl_attention_grad_bias_f32(const hl_attention_grad_bias_plan *plan, const float *q, const float *k, const float *v,
                               const float *bias, const float *y, const float *lse, const float *gy, float *gbias);
int hl_attention_grad_bias_f64(const hl_attention_grad_bias_plan *plan, const double *q, const double *k,
                               const double *v, const double *bias, const double *y, const double *lse,
                               const double *gy, double *gbias);

/* y[P,A,C,B,D] = x[A,B,P,C,D]. */
typedef struct { int64_t A, B, P, C, D; } hl_move_heads_plan;
int hl_move_heads_f32(const hl_move_heads_plan *plan, const float *x, float *y);
int hl_move_heads_f64(const hl_move_heads_plan *plan, const double *x, double *y);

/* Pairs (a, b) of x[M,L,2C] turned: (a cos - b sin, a sin + b cos), the other way with inverse. */
typedef struct { int64_t M, L, C, interleaved, inverse; } hl_rotary_plan;
int hl_rotary_f32(const hl_rotary_plan *plan, const float *x, const float *cos, const float *sin, float *y);
int hl_rotary_f64(const hl_rotary_plan *plan, const double *x, const double *cos, const double *sin, double *y);

/* ---- boxes ---- */

/* area = (x2 - x1) * (y2 - y1) of boxes[N,4]. */
typedef struct { int64_t N; } hl_box_area_plan;
int hl_box_area_f32(const hl_box_area_plan *plan, const float *boxes, float *area);
int hl_box_area_f64(const hl_box_area_plan *plan, const double *boxes, double *area);

/* Its gradient. */
typedef struct { int64_t N; } hl_box_area_grad_plan;
int hl_box_area_grad_f32(const hl_box_area_grad_plan *plan, const float *grad, const float *boxes, float *grad_boxes);
int hl_box_area_grad_f64(const hl_box_area_grad_plan *plan, const double *grad, const double *boxes,
                         double *grad_boxes);

/* Boxes in another notation: 0 x1 y1 x2 y2, 1 x1 y1 w h, 2 cx cy w h. */
typedef struct { int64_t N, source, target; } hl_box_convert_plan;
int hl_box_convert_f32(const hl_box_convert_plan *plan, const float *boxes, float *converted);
int hl_box_convert_f64(const hl_box_convert_plan *plan, const double *boxes, double *converted);

/* Its gradient. */
typedef struct { int64_t N, source, target; } hl_box_convert_grad_plan;
int hl_box_convert_grad_f32(const hl_box_convert_grad_plan *plan, const float *grad, float *grad_boxes);
int hl_box_convert_grad_f64(const hl_box_convert_grad_plan *plan, const double *grad, double *grad_boxes);

/* x into [0, width], y into [0, height]. */
typedef struct {
    int64_t N;
    double height, width;
} hl_clip_boxes_plan;
int hl_clip_boxes_f32(const hl_clip_boxes_plan *plan, const float *boxes, float *clipped);
int hl_clip_boxes_f64(const hl_clip_boxes_plan *plan, const double *boxes, double *clipped);

/* Its gradient: 0 outside. */
typedef struct {
    int64_t N;
    double height, width;
} hl_clip_boxes_grad_plan;
int hl_clip_boxes_grad_f32(const hl_clip_boxes_grad_plan *plan, const float *grad, const float *boxes,
                           float *grad_boxes);
int hl_clip_boxes_grad_f64(const hl_clip_boxes_grad_plan *plan, const double *grad, const double *boxes,
                           double *grad_boxes);

/* keep: the indices of the boxes with both sides >= min_size, then -1; count[1]: how many. */
typedef struct {
    int64_t N;
    double min_size;
} hl_remove_small_boxes_plan;
int hl_remove_small_boxes_f32(const hl_remove_small_boxes_plan *plan, const float *boxes, int64_t *keep,
                              int64_t *count);
int hl_remove_small_boxes_f64(const hl_remove_small_boxes_plan *plan, const double *boxes, int64_t *keep,
                              int64_t *count);

/* Overlap [N,M] of boxes1[N,4] and boxes2[M,4]. kind: 0 IoU, 1 GIoU, 2 DIoU, 3 CIoU. */
typedef struct {
    int64_t N, M, kind;
    double eps;
} hl_box_iou_plan;
int hl_box_iou_f32(const hl_box_iou_plan *plan, const float *boxes1, const float *boxes2, float *iou);
int hl_box_iou_f64(const hl_box_iou_plan *plan, const double *boxes1, const double *boxes2, double *iou);

/* Overlap [N] of boxes1[i] and boxes2[i]. */
typedef struct {
    int64_t N, kind;
    double eps;
} hl_box_iou_paired_plan;
int hl_box_iou_paired_f32(const hl_box_iou_paired_plan *plan, const float *boxes1, const float *boxes2, float *iou);
int hl_box_iou_paired_f64(const hl_box_iou_paired_plan *plan, const double *boxes1, const double *boxes2, double *iou);

/* The gradient of box_iou by boxes1 (K = N), or by boxes2 where second is 1 (K = M). */
typedef struct {
    int64_t N, M, K, kind;
    double eps;
    int64_t second;
} hl_box_iou_grad_plan;
int hl_box_iou_grad_f32(const hl_box_iou_grad_plan *plan, const float *grad, const float *boxes1, const float *boxes2,
                        float *grad_boxes);
int hl_box_iou_grad_f64(const hl_box_iou_grad_plan *plan, const double *grad, const double *boxes1,
                        const double *boxes2, double *grad_boxes);

/* The gradients of box_iou_paired. */
typedef struct {
    int64_t N, kind;
    double eps;
} hl_box_iou_paired_grad_plan;
int hl_box_iou_paired_grad_f32(const hl_box_iou_paired_grad_plan *plan, const float *grad, const float *boxes1,
                               const float *boxes2, float *grad_boxes1, float *grad_boxes2);
int hl_box_iou_paired_grad_f64(const hl_box_iou_paired_grad_plan *plan, const double *grad, const double *boxes1,
                               const double *boxes2, double *grad_boxes1, double *grad_boxes2);

/* counts[N]: the boxes of boxes2[M,4] whose IoU with boxes1[n] is above the threshold. */
typedef struct {
    int64_t N, M;
    double threshold;
} hl_sparse_box_iou_count_plan;
int hl_sparse_box_iou_count_f32(const hl_sparse_box_iou_count_plan *plan, const float *boxes1, const float *boxes2,
                                int64_t *counts);
int hl_sparse_box_iou_count_f64(const hl_sparse_box_iou_count_plan *plan, const double *boxes1, const double *boxes2,
                                int64_t *counts);

/* Those pairs by row, then column, and their IoU; K is the sum of counts. */
typedef struct {
    int64_t N, M, K;
    double threshold;
} hl_sparse_box_iou_plan;
int hl_sparse_box_iou_f32(const hl_sparse_box_iou_plan *plan, const float *boxes1, const float *boxes2,
                          const int64_t *counts, int64_t *rows, int64_t *cols, float *iou);
int hl_sparse_box_iou_f64(const hl_sparse_box_iou_plan *plan, const double *boxes1, const double *boxes2,
                          const int64_t *counts, int64_t *rows, int64_t *cols, double *iou);

/* keep: what survives non-maximum suppression, by decreasing score, then -1; count[1]: how many. groups may be NULL. */
typedef struct {
    int64_t N;
    double iou_threshold, score_threshold;
    int64_t max_output;
} hl_nms_plan;
int hl_nms_f32(const hl_nms_plan *plan, const float *boxes, const float *scores, const int64_t *groups, int64_t *keep,
               int64_t *count);
int hl_nms_f64(const hl_nms_plan *plan, const double *boxes, const double *scores, const int64_t *groups, int64_t *keep,
               int64_t *count);

/* Takes the best box again and again and lowers the scores that overlap it, linearly or by a Gaussian. */
typedef struct {
    int64_t N, gaussian;
    double iou_threshold, sigma, score_threshold;
} hl_soft_nms_plan;
int hl_soft_nms_f32(const hl_soft_nms_plan *plan, const float *boxes, const float *scores, int64_t *keep,
                    float *kept_scores, int64_t *count);
int hl_soft_nms_f64(const hl_soft_nms_plan *plan, const double *boxes, const double *scores, int64_t *keep,
                    double *kept_scores, int64_t *count);

/* Bins of bilinear samples of boxes[K,5] (image, x1, y1, x2, y2). bad[1]: 1 + the first RoI whose image is out of range
 * (then nothing else is written), else 0. */
typedef struct {
    int64_t N, C, H, W, K, PH, PW;
    double spatial_scale;
    int64_t sampling_ratio, aligned, maximum;
} hl_roi_align_plan;
int hl_roi_align_f32(const hl_roi_align_plan *plan, const float *input, const float *boxes, float *output,
                     int64_t *bad);
int hl_roi_align_f64(const hl_roi_align_plan *plan, const double *input, const double *boxes, double *output,
                     int64_t *bad);

/* Its gradient by the input. */
typedef struct {
    int64_t K, C, PH, PW, N, H, W;
    double spatial_scale;
    int64_t sampling_ratio, aligned, maximum;
} hl_roi_align_grad_plan;
int hl_roi_align_grad_f32(const hl_roi_align_grad_plan *plan, const float *grad, const float *input, const float *boxes,
                          float *grad_input, int64_t *bad);
int hl_roi_align_grad_f64(const hl_roi_align_grad_plan *plan, const double *grad, const double *input,
                          const double *boxes, double *grad_input, int64_t *bad);

/* Bins of the largest pixel of boxes[K,5]; bad as in roi_align. */
typedef struct {
    int64_t N, C, H, W, K, PH, PW;
    double spatial_scale;
} hl_roi_pool_plan;
int hl_roi_pool_f32(const hl_roi_pool_plan *plan, const float *input, const float *boxes, float *output, int64_t *bad);
int hl_roi_pool_f64(const hl_roi_pool_plan *plan, const double *input, const double *boxes, double *output,
                    int64_t *bad);

/* Its gradient by the input. */
typedef struct {
    int64_t K, C, PH, PW, N, H, W;
    double spatial_scale;
} hl_roi_pool_grad_plan;
int hl_roi_pool_grad_f32(const hl_roi_pool_grad_plan *plan, const float *grad, const float *input, const float *boxes,
                         float *grad_input, int64_t *bad);
int hl_roi_pool_grad_f64(const hl_roi_pool_grad_plan *plan, const double *grad, const double *input,
                         const double *boxes, double *grad_input, int64_t *bad);

/* Overlap [A,B] of masks of P bytes, 0 or 1. */
typedef struct { int64_t A, P, B; } hl_mask_iou_plan;
int hl_mask_iou_f32(const hl_mask_iou_plan *plan, const uint8_t *masks1, const uint8_t *masks2, float *iou);
int hl_mask_iou_f64(const hl_mask_iou_plan *plan, const uint8_t *masks1, const uint8_t *masks2, double *iou);

/* First and last column and row of each mask [N,H,W] of bytes 0 or 1. */
typedef struct { int64_t N, H, W; } hl_masks_to_boxes_plan;
int hl_masks_to_boxes_f32(const hl_masks_to_boxes_plan *plan, const uint8_t *masks, float *boxes);
int hl_masks_to_boxes_f64(const hl_masks_to_boxes_plan *plan, const uint8_t *masks, double *boxes);

/* ---- conv ---- */

/* y[N,F,OD,OH,OW] = convolution (cross-correlation) of x[N,C,D,H,W] with w[F,CG,KD,KH,KW], + b[F], then the function of
 * number `activation` (hl_activate); b may be NULL. Pads are those in front; the sizes of y say where it ends. exact = 0
 * allows Winograd in float32: a few more roundings, and an infinity or NaN in x reaches up to four neighbours farther. */
typedef struct {
    int64_t N, C, D, H, W, F, CG, KD, KH, KW, OD, OH, OW;
    int64_t groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact,
        activation;
} hl_conv_plan;
int hl_conv_f32(const hl_conv_plan *plan, const float *x, const float *w, const float *b, float *y);
int hl_conv_f64(const hl_conv_plan *plan, const double *x, const double *w, const double *b, double *y);

/* gx[N,C,D,H,W] of conv, + b[C] (then it is the transposed convolution); b may be NULL. An infinite or NaN weight reaches
 * only what it is multiplied into: then every product is added alone, slowly. */
typedef struct {
    int64_t N, F, OD, OH, OW, CG, KD, KH, KW, C, D, H, W;
    int64_t groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact;
} hl_conv_grad_input_plan;
int hl_conv_grad_input_f32(const hl_conv_grad_input_plan *plan, const float *gy, const float *w, const float *b,
                           float *gx);
int hl_conv_grad_input_f64(const hl_conv_grad_input_plan *plan, const double *gy, const double *w, const double *b,
                           double *gx);

/* gw[F,CG,KD,KH,KW] of conv. */
typedef struct {
    int64_t N, F, OD, OH, OW, C, D, H, W, CG, KD, KH, KW;
    int64_t groups, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w, exact;
} hl_conv_grad_weight_plan;
int hl_conv_grad_weight_f32(const hl_conv_grad_weight_plan *plan, const float *gy, const float *x, float *gw);
int hl_conv_grad_weight_f64(const hl_conv_grad_weight_plan *plan, const double *gy, const double *x, double *gw);

/* gb[F] = sum of gy[N,F,S] over N and S. */
typedef struct { int64_t N, F, S; } hl_conv_grad_bias_plan;
int hl_conv_grad_bias_f32(const hl_conv_grad_bias_plan *plan, const float *gy, float *gb);
int hl_conv_grad_bias_f64(const hl_conv_grad_bias_plan *plan, const double *gy, double *gb);

/* y[N,F,OH,OW] = deformable convolution of x[N,C,H,W] with w[F,CG,KH,KW], + b[F]: tap k reads offset[N,OG,KH,KW,2,OH,OW]
 * pixels beside its place, bilinearly, times mask[N,OG,KH,KW,OH,OW]; mask and b may be NULL. */
typedef struct {
    int64_t N, C, H, W, OG, KH, KW, OH, OW, F, CG;
    int64_t groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_deform_conv_plan;
int hl_deform_conv_f32(const hl_deform_conv_plan *plan, const float *x, const float *offset, const float *mask,
                       const float *w, const float *b, float *y);
int hl_deform_conv_f64(const hl_deform_conv_plan *plan, const double *x, const double *offset, const double *mask,
                       const double *w, const double *b, double *y);

/* The gradients of deform_conv by x, offset and mask, those that are not NULL. */
typedef struct {
    int64_t N, F, OH, OW, C, H, W, OG, KH, KW, CG;
    int64_t groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_deform_conv_grad_samples_plan;
int hl_deform_conv_grad_samples_f32(const hl_deform_conv_grad_samples_plan *plan, const float *gy, const float *x,
                                    const float *offset, const float *mask, const float *w, float *gx, float *goffset,
                                    float *gmask);
int hl_deform_conv_grad_samples_f64(const hl_deform_conv_grad_samples_plan *plan, const double *gy, const double *x,
                                    const double *offset, const double *mask, const double *w, double *gx,
                                    double *goffset, double *gmask);

/* gw[F,CG,KH,KW] of deform_conv. */
typedef struct {
    int64_t N, F, OH, OW, C, H, W, OG, KH, KW, CG;
    int64_t groups, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_deform_conv_grad_weight_plan;
int hl_deform_conv_grad_weight_f32(const hl_deform_conv_grad_weight_plan *plan, const float *gy, const float *x,
                                   const float *offset, const float *mask, float *gw);
int hl_deform_conv_grad_weight_f64(const hl_deform_conv_grad_weight_plan *plan, const double *gy, const double *x,
                                   const double *offset, const double *mask, double *gw);

/* cols[N,C,KH,KW,OH,OW]: the patch under each window of x[N,C,H,W], 0 in the padding. */
typedef struct {
    int64_t N, C, H, W, KH, KW, OH, OW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_unfold_plan;
int hl_unfold_f32(const hl_unfold_plan *plan, const float *x, float *cols);
int hl_unfold_f64(const hl_unfold_plan *plan, const double *x, double *cols);

/* x[N,C,H,W] = the sum of what the windows of cols[N,C,KH,KW,OH,OW] hold of it: the adjoint of unfold. */
typedef struct {
    int64_t N, C, KH, KW, OH, OW, H, W, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_fold_plan;
int hl_fold_f32(const hl_fold_plan *plan, const float *cols, float *x);
int hl_fold_f64(const hl_fold_plan *plan, const double *cols, double *x);

/* cols[N,OH,OW,C,KH,KW]: the patch under each window of x[N,C,H,W], 0 in the padding. */
typedef struct {
    int64_t N, C, H, W, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_im2col_plan;
int hl_im2col_f32(const hl_im2col_plan *plan, const float *x, float *cols);
int hl_im2col_f64(const hl_im2col_plan *plan, const double *x, double *cols);

/* x[N,C,H,W] = the sum of what the windows of cols[N,OH,OW,C,KH,KW] hold of it: the adjoint of im2col. */
typedef struct {
    int64_t N, OH, OW, C, KH, KW, H, W, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} hl_col2im_plan;
int hl_col2im_f32(const hl_col2im_plan *plan, const float *cols, float *x);
int hl_col2im_f64(const hl_col2im_plan *plan, const double *cols, double *x);

/* ---- linear ---- */

/* y[M,N] = x[M,K] w[N,K]^T + b[N], then the function of number `activation` (hl_activate); b may be NULL. */
typedef struct { int64_t M, K, N, activation; } hl_linear_plan;
int hl_linear_f32(const hl_linear_plan *plan, const float *x, const float *w, const float *b, float *y);
int hl_linear_f64(const hl_linear_plan *plan, const double *x, const double *w, const double *b, double *y);

/* gw[N,K] = gy[M,N]^T x[M,K]. */
typedef struct { int64_t M, N, K; } hl_linear_grad_weight_plan;
int hl_linear_grad_weight_f32(const hl_linear_grad_weight_plan *plan, const float *gy, const float *x, float *gw);
int hl_linear_grad_weight_f64(const hl_linear_grad_weight_plan *plan, const double *gy, const double *x, double *gw);

/* gx[M,K] = gy[M,N] w[N,K]. */
typedef struct { int64_t M, N, K; } hl_linear_grad_input_plan;
int hl_linear_grad_input_f32(const hl_linear_grad_input_plan *plan, const float *gy, const float *w, float *gx);
int hl_linear_grad_input_f64(const hl_linear_grad_input_plan *plan, const double *gy, const double *w, double *gx);

/* y[B,M,N] = a[B,M,K] b[B,K,N]. */
typedef struct { int64_t B, M, K, N; } hl_matmul_plan;
int hl_matmul_f32(const hl_matmul_plan *plan, const float *a, const float *b, float *y);
int hl_matmul_f64(const hl_matmul_plan *plan, const double *a, const double *b, double *y);

/* ---- elementary functions as the kernels have them, for tests; no kernel of the specification ---- */

/* y[N] = function(x[N]); EXP_BELOW is for x <= 0, EXP2 for x < 127, the GATEs err more than their namesakes. */
#define HL_EXP 0
#define HL_EXP_BELOW 1
#define HL_EXP2 2
#define HL_LOG 3
#define HL_TANH 4
#define HL_SIGMOID 5
#define HL_ERF 6
#define HL_TANH_GATE 7
#define HL_SIGMOID_GATE 8
typedef struct { int64_t N, function; } hl_elementary_plan;
int hl_elementary_f32(const hl_elementary_plan *plan, const float *x, float *y);
int hl_elementary_f64(const hl_elementary_plan *plan, const double *x, double *y);

/* ---- peak: the roofs of this machine, for benchmarks; no kernels of the specification ---- */

/* `chunks` times `count` multiply-adds (a multiple of 384) in registers; sums[chunks]. */
int hl_peak_fma_f32(int64_t chunks, int64_t count, float *sums);
int hl_peak_fma_f64(int64_t chunks, int64_t count, double *sums);

/* Reads x[16384 * blocks]; sums[blocks]. */
int hl_peak_read_f32(int64_t blocks, const float *x, float *sums);
int hl_peak_read_f64(int64_t blocks, const double *x, double *sums);

/* y[16384 * blocks] = x; written past the cache when past_cache is 1 and y is aligned to 64 bytes. */
int hl_peak_copy_f32(int64_t blocks, int64_t past_cache, const float *x, float *y);
int hl_peak_copy_f64(int64_t blocks, int64_t past_cache, const double *x, double *y);

/* gb[N] = the sum of the rows of gy[M,N]. */
typedef struct { int64_t M, N; } hl_linear_grad_bias_plan;
int hl_linear_grad_bias_f32(const hl_linear_grad_bias_plan *plan, const float *gy, float *gb);
int hl_linear_grad_bias_f64(const hl_linear_grad_bias_plan *plan, const double *gy, double *gb);

/* ga[B,M,K] = gy[B,M,N] b[B,K,N]^T. */
typedef struct { int64_t B, M, N, K; } hl_matmul_grad_a_plan;
int hl_matmul_grad_a_f32(const hl_matmul_grad_a_plan *plan, const float *gy, const float *b, float *ga);
int hl_matmul_grad_a_f64(const hl_matmul_grad_a_plan *plan, const double *gy, const double *b, double *ga);

/* gb[B,K,N] = a[B,M,K]^T gy[B,M,N]. */
typedef struct { int64_t B, M, K, N; } hl_matmul_grad_b_plan;
int hl_matmul_grad_b_f32(const hl_matmul_grad_b_plan *plan, const float *a, const float *gy, float *gb);
int hl_matmul_grad_b_f64(const hl_matmul_grad_b_plan *plan, const double *a, const double *gy, double *gb);

/* y = scale x where 24 random bits of the element's place and the seed are at least drop, 0 elsewhere. */
typedef struct {
    int64_t N, drop;
    double scale;
    int64_t seed;
} hl_dropout_plan;
int hl_dropout_f32(const hl_dropout_plan *plan, const float *x, float *y);
int hl_dropout_f64(const hl_dropout_plan *plan, const double *x, double *y);

/* ---- pool ---- */

/* The largest element of each window; indices: its place in its plane; offsets: its tap, at most 256 taps. Both may
 * be NULL. */
typedef struct {
    int64_t M, D, H, W, OD, OH, OW, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top,
        pad_left, dilation_d, dilation_h, dilation_w;
} hl_max_pool_plan;
int hl_max_pool_f32(const hl_max_pool_plan *plan, const float *x, float *y, int64_t *indices, uint8_t *offsets);
int hl_max_pool_f64(const hl_max_pool_plan *plan, const double *x, double *y, int64_t *indices, uint8_t *offsets);

/* Adds each gradient to the element that offsets (as max_pool wrote them) name; gx is 0 elsewhere. */
typedef struct {
    int64_t M, OD, OH, OW, D, H, W, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_top,
        pad_left, dilation_d, dilation_h, dilation_w;
} hl_max_pool_backward_plan;
int hl_max_pool_backward_f32(const hl_max_pool_backward_plan *plan, const float *gy, const uint8_t *offsets, float *gx);
int hl_max_pool_backward_f64(const hl_max_pool_backward_plan *plan, const double *gy, const uint8_t *offsets,
                             double *gx);

/* The largest element of windows that share the input out; indices may be NULL. */
typedef struct { int64_t M, D, H, W, OD, OH, OW; } hl_adaptive_max_pool_plan;
int hl_adaptive_max_pool_f32(const hl_adaptive_max_pool_plan *plan, const float *x, float *y, int64_t *indices);
int hl_adaptive_max_pool_f64(const hl_adaptive_max_pool_plan *plan, const double *x, double *y, int64_t *indices);

/* Adds each gradient to the element that its index, in 0 .. L - 1, names; gx is 0 elsewhere. */
typedef struct { int64_t M, O, L; } hl_adaptive_max_pool_backward_plan;
int hl_adaptive_max_pool_backward_f32(const hl_adaptive_max_pool_backward_plan *plan, const float *gy,
                                      const int64_t *indices, float *gx);
int hl_adaptive_max_pool_backward_f64(const hl_adaptive_max_pool_backward_plan *plan, const double *gy,
                                      const int64_t *indices, double *gx);

/* The sum of each window over its divisor (0: its taps, those in the padding too where count_include_pad). */
typedef struct {
    int64_t M, D, H, W, OD, OH, OW, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back,
        pad_top, pad_bottom, pad_left, pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor;
} hl_avg_pool_plan;
int hl_avg_pool_f32(const hl_avg_pool_plan *plan, const float *x, float *y);
int hl_avg_pool_f64(const hl_avg_pool_plan *plan, const double *x, double *y);

/* Adds each gradient over its divisor to every element of its window. */
typedef struct {
    int64_t M, OD, OH, OW, D, H, W, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_front, pad_back,
        pad_top, pad_bottom, pad_left, pad_right, dilation_d, dilation_h, dilation_w, count_include_pad, divisor;
} hl_avg_pool_backward_plan;
int hl_avg_pool_backward_f32(const hl_avg_pool_backward_plan *plan, const float *gy, float *gx);
int hl_avg_pool_backward_f64(const hl_avg_pool_backward_plan *plan, const double *gy, double *gx);

/* The mean of windows that share the input out. */
typedef struct { int64_t M, D, H, W, OD, OH, OW; } hl_adaptive_avg_pool_plan;
int hl_adaptive_avg_pool_f32(const hl_adaptive_avg_pool_plan *plan, const float *x, float *y);
int hl_adaptive_avg_pool_f64(const hl_adaptive_avg_pool_plan *plan, const double *x, double *y);

/* Adds each gradient over the size of its window to every element of the window. */
typedef struct { int64_t M, OD, OH, OW, D, H, W; } hl_adaptive_avg_pool_backward_plan;
int hl_adaptive_avg_pool_backward_f32(const hl_adaptive_avg_pool_backward_plan *plan, const float *gy, float *gx);
int hl_adaptive_avg_pool_backward_f64(const hl_adaptive_avg_pool_backward_plan *plan, const double *gy, double *gx);

/* (sum of x^norm)^(1/norm) of each window. */
typedef struct {
    int64_t M, D, H, W, OD, OH, OW, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h,
        dilation_w;
    double norm;
} hl_lp_pool_plan;
int hl_lp_pool_f32(const hl_lp_pool_plan *plan, const float *x, float *y);
int hl_lp_pool_f64(const hl_lp_pool_plan *plan, const double *x, double *y);

/* The gradient of lp_pool, which gave y. */
typedef struct {
    int64_t M, OD, OH, OW, D, H, W, kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, dilation_d, dilation_h,
        dilation_w;
    double norm;
} hl_lp_pool_backward_plan;
int hl_lp_pool_backward_f32(const hl_lp_pool_backward_plan *plan, const float *gy, const float *x, const float *y,
                            float *gx);
int hl_lp_pool_backward_f64(const hl_lp_pool_backward_plan *plan, const double *gy, const double *x, const double *y,
                            double *gx);

/* y[indices] = x, 0 elsewhere. bad = 1 + the place of the first index outside of 0 .. L - 1, else 0; nothing else is
 * written then. */
typedef struct { int64_t M, O, L; } hl_max_unpool_plan;
int hl_max_unpool_f32(const hl_max_unpool_plan *plan, const float *x, const int64_t *indices, float *y, int64_t *bad);
int hl_max_unpool_f64(const hl_max_unpool_plan *plan, const double *x, const int64_t *indices, double *y, int64_t *bad);

/* gx = gy[indices]; the indices are in 0 .. L - 1. */
typedef struct { int64_t M, L, O; } hl_max_unpool_backward_plan;
int hl_max_unpool_backward_f32(const hl_max_unpool_backward_plan *plan, const float *gy, const int64_t *indices,
                               float *gx);
int hl_max_unpool_backward_f64(const hl_max_unpool_backward_plan *plan, const double *gy, const int64_t *indices,
                               double *gx);

/* ---- rnn ---- */

/* gates[T,N,4H] becomes i f g o; b_ih, b_hh, peephole[3,H] (i o f), lengths[N], gates, cells and previous may be NULL;
 * clip 0 limits nothing. */
typedef struct {
    int64_t T, N, D, H, reverse;
    double clip;
} hl_lstm_sequence_plan;
int hl_lstm_sequence_f32(const hl_lstm_sequence_plan *plan, const float *x, const float *w_ih, const float *b_ih,
                         const float *h0, const float *c0, const float *w_hh, const float *b_hh, const float *peephole,
                         const int64_t *lengths, float *y, float *hn, float *cn, float *gates, float *cells,
                         float *previous);
int hl_lstm_sequence_f64(const hl_lstm_sequence_plan *plan, const double *x, const double *w_ih, const double *b_ih,
                         const double *h0, const double *c0, const double *w_hh, const double *b_hh,
                         const double *peephole, const int64_t *lengths, double *y, double *hn, double *cn,
                         double *gates, double *cells, double *previous);

/* Gradients of the gates' arguments and of the first state; gy, ghn, gcn, peephole, lengths may be NULL. */
typedef struct {
    int64_t T, N, H, reverse;
    double clip;
} hl_lstm_sequence_backward_plan;
int hl_lstm_sequence_backward_f32(const hl_lstm_sequence_backward_plan *plan, const float *gy, const float *ghn,
                                  const float *gcn, const float *gates, const float *cells, const float *c0,
                                  const float *w_hh, const float *peephole, const int64_t *lengths, float *gpre,
                                  float *gh0, float *gc0);
int hl_lstm_sequence_backward_f64(const hl_lstm_sequence_backward_plan *plan, const double *gy, const double *ghn,
                                  const double *gcn, const double *gates, const double *cells, const double *c0,
                                  const double *w_hh, const double *peephole, const int64_t *lengths, double *gpre,
                                  double *gh0, double *gc0);

/* gp[3,H] (i o f): the sum over steps of a gate's gradient times the cell that it looks at. */
typedef struct { int64_t T, N, H, reverse; } hl_lstm_peephole_grad_plan;
int hl_lstm_peephole_grad_f32(const hl_lstm_peephole_grad_plan *plan, const float *gpre, const float *cells,
                              const float *c0, const int64_t *lengths, float *gp);
int hl_lstm_peephole_grad_f64(const hl_lstm_peephole_grad_plan *plan, const double *gpre, const double *cells,
                              const double *c0, const int64_t *lengths, double *gp);

/* gates[T,N,3H] becomes r z n, hidden h W_hn^T + b_hn (reset_after) or r h; b_ih, b_hh, lengths, gates, hidden, previous
 * may be NULL. */
typedef struct { int64_t T, N, D, H, reverse, reset_after; } hl_gru_sequence_plan;
int hl_gru_sequence_f32(const hl_gru_sequence_plan *plan, const float *x, const float *w_ih, const float *b_ih,
                        const float *h0, const float *w_hh, const float *b_hh, const int64_t *lengths, float *y,
                        float *hn, float *gates, float *hidden, float *previous);
int hl_gru_sequence_f64(const hl_gru_sequence_plan *plan, const double *x, const double *w_ih, const double *b_ih,
                        const double *h0, const double *w_hh, const double *b_hh, const int64_t *lengths, double *y,
                        double *hn, double *gates, double *hidden, double *previous);

/* Gradients of the gates' arguments on the input's and on the state's side; gy, ghn, lengths may be NULL. */
typedef struct { int64_t T, N, H, reverse, reset_after; } hl_gru_sequence_backward_plan;
int hl_gru_sequence_backward_f32(const hl_gru_sequence_backward_plan *plan, const float *gy, const float *ghn,
                                 const float *gates, const float *hidden, const float *previous, const float *w_hh,
                                 const int64_t *lengths, float *gpre, float *ghidden, float *gh0);
int hl_gru_sequence_backward_f64(const hl_gru_sequence_backward_plan *plan, const double *gy, const double *ghn,
                                 const double *gates, const double *hidden, const double *previous, const double *w_hh,
                                 const int64_t *lengths, double *gpre, double *ghidden, double *gh0);

/* gates[T,N,H] becomes h; b_ih, b_hh, lengths, gates, previous may be NULL. */
typedef struct { int64_t T, N, D, H, reverse, relu; } hl_rnn_sequence_plan;
int hl_rnn_sequence_f32(const hl_rnn_sequence_plan *plan, const float *x, const float *w_ih, const float *b_ih,
                        const float *h0, const float *w_hh, const float *b_hh, const int64_t *lengths, float *y,
                        float *hn, float *gates, float *previous);
int hl_rnn_sequence_f64(const hl_rnn_sequence_plan *plan, const double *x, const double *w_ih, const double *b_ih,
                        const double *h0, const double *w_hh, const double *b_hh, const int64_t *lengths, double *y,
                        double *hn, double *gates, double *previous);

/* Gradients of the arguments and of the first state; gy, ghn, lengths may be NULL. */
typedef struct { int64_t T, N, H, reverse, relu; } hl_rnn_sequence_backward_plan;
int hl_rnn_sequence_backward_f32(const hl_rnn_sequence_backward_plan *plan, const float *gy, const float *ghn,
                                 const float *gates, const float *w_hh, const int64_t *lengths, float *gpre,
                                 float *gh0);
int hl_rnn_sequence_backward_f64(const hl_rnn_sequence_backward_plan *plan, const double *gy, const double *ghn,
                                 const double *gates, const double *w_hh, const int64_t *lengths, double *gpre,
                                 double *gh0);

/* cffi:end */
#endif
