/* Channel arithmetic: what follows from the sums of a channel; the twin of fastbn/backends/_numba/channels.py. What depends
   on the value type is in kernels.h. */

#ifndef FASTBN_CHANNELS_H
#define FASTBN_CHANNELS_H

#include "common.h"

/* Moments of so many channels in two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays infinite. */
point void merge(Index count, Index size_a, double *mean_a, double *m2_a, Index size_b, const double *mean_b,
                 const double *m2_b) {
    const double share = (double)size_b / (size_a + size_b), weight = size_a * share;
    for (Index k = 0; k < count; k++) {
        const double delta = mean_b[k] - mean_a[k], m2 = m2_a[k] + m2_b[k] + delta * delta * weight;
        const double mean = mean_a[k] + delta * share, sum = mean_a[k] + mean_b[k];
        m2_a[k] = isfinite(delta) ? m2 : NAN;
        mean_a[k] = isfinite(delta) ? mean : sum;
    }
}

/* Mean and m2 from sums of deviations from `shift` and of their squares. */
point void moments_of(double shift, Index count, double sum1, double sum2, double *mean, double *m2) {
    const double average = sum1 / count, squares = sum2 - sum1 * average;
    *mean = shift + average;
    *m2 = squares < 0 ? 0 : squares;
}

/* A parameter of channel c, or what stands for it where there is none. */
point double parameter(const Job *job, const void *values, Index c, double otherwise) {
    if (!values) return otherwise;
    return job->wide ? ((const double *)values)[c] : ((const float *)values)[c];
}

/* Let a parameter of channel c be `value`. */
point void set_parameter(const Job *job, void *values, Index c, double value) {
    if (job->wide) ((double *)values)[c] = value;
    else ((float *)values)[c] = (float)value;
}

/* `stats` of so many channels from c0 on, and `affine` around 0 with the bias as its shift. */
point void normalisation(const Job *job, Index c0, Index count, const double *mean, const double *var) {
    double invstd[TOGETHER];
    for (Index k = 0; k < count; k++) invstd[k] = 1 / sqrt(var[k] + job->eps);
    double *stats = job->stats + c0, *affine = job->affine + c0;
    for (Index k = 0; k < count; k++) {
        stats[k] = mean[k];
        stats[k + job->channels] = var[k];
        stats[k + 2 * job->channels] = invstd[k];
        affine[k] = 0;
        affine[k + job->channels] = parameter(job, job->weight, c0 + k, 1) * invstd[k];
        affine[k + 2 * job->channels] = parameter(job, job->bias, c0 + k, 0);
    }
}

/* Move the running statistics towards the batch's, the variance unbiased, by `factor`. */
point void update_running(const Job *job, Index c0, Index count, const double *mean, const double *var) {
    const double size = (double)job->n * job->s, unbiased = size / (size - 1), factor = job->factor;
    for (Index k = 0, c = c0; k < count; k++, c++) {
        const double mean_before = parameter(job, job->running_mean, c, 0);
        const double var_before = parameter(job, job->running_var, c, 0);
        set_parameter(job, job->running_mean, c, (1 - factor) * mean_before + factor * mean[k]);
        set_parameter(job, job->running_var, c, (1 - factor) * var_before + factor * (unbiased * var[k]));
    }
}

/* All that follows from the moments of so many channels from c0 on. */
point void finish_statistics(const Job *job, Index c0, Index count, const double *mean, const double *m2) {
    const double size = (double)job->n * job->s;
    double var[TOGETHER];
    for (Index k = 0; k < count; k++) var[k] = m2[k] / size;
    normalisation(job, c0, count, mean, var);
    for (Index k = 0; k < count; k++) job->affine[c0 + k] = mean[k];
    if (job->running_mean) update_running(job, c0, count, mean, var);
}

/* Inference: `stats` and `affine` from the running statistics; the center is 0. */
static inline void fold(const Job *job) {
    double *affine = job->affine, mean[TOGETHER], var[TOGETHER];
    for (Index c0 = 0; c0 < job->channels; c0 += TOGETHER) {
        const Index count = min(TOGETHER, job->channels - c0);
        for (Index k = 0; k < count; k++) {
            mean[k] = parameter(job, job->running_mean, c0 + k, 0);
            var[k] = parameter(job, job->running_var, c0 + k, 1);
        }
        normalisation(job, c0, count, mean, var);
        for (Index k = 0, c = c0; k < count; k++, c++)
            affine[2 * job->channels + c] -= mean[k] * affine[job->channels + c];
    }
}

/* All that follows from the sums of dy and dy * (x - MEAN), where MEAN is `low` less than the mean: dweight, dbias, and A, B
   of dx = SCALE * dy + A * (x - MEAN) + B. */
point void finish_gradients(const Job *job, Index c0, Index count, const double *low, const double *sum_dy,
                            const double *dot) {
    const double size = (double)job->n * job->s, *invstd = job->stats + 2 * job->channels + c0;
    const double *scale = job->affine + job->channels + c0;
    double dweight[TOGETHER], a[TOGETHER], b[TOGETHER];
    for (Index k = 0; k < count; k++) {
        const double sum = dot[k] - low[k] * sum_dy[k];
        dweight[k] = sum * invstd[k];
        a[k] = -scale[k] * invstd[k] * invstd[k] * sum / size;
        b[k] = -scale[k] * sum_dy[k] / size - a[k] * low[k];
    }
    double *grads = job->grads + c0;
    for (Index k = 0; k < count; k++) {
        set_parameter(job, job->weight, c0 + k, dweight[k]);
        set_parameter(job, job->bias, c0 + k, sum_dy[k]);
        grads[k + 2 * job->channels] = a[k];
        grads[k + 3 * job->channels] = b[k];
    }
}

#endif
