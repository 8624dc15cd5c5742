// What fastbn is measured against, as a C library for native.py:
//   copy_plain, copy_stream   one read and one write of so many bytes: the memory limit of this machine
//   probe                     how fast its cores compute just now, and how far apart they are
//   norm_*                    oneDNN's batch normalization, where it is installed (-DWITH_ONEDNN)

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr long block = 1 << 14;   // bytes that one thread copies at a time
constexpr long serial = 1 << 16;  // bytes that one thread copies sooner than two

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void stream_block_512(const char* from, char* to) {
    for (long i = 0; i < block; i += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}

__attribute__((target("avx"))) void stream_block_256(const char* from, char* to) {
    for (long i = 0; i < block; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
#endif

void copy_tail(const char* from, char* to, long bytes) {
    const long done = bytes / block * block;
    std::memcpy(to + done, from + done, bytes - done);
}

}  // namespace

extern "C" {

void set_threads(int threads) { omp_set_num_threads(threads); }

void copy_plain(const char* from, char* to, long bytes) {
#pragma omp parallel for schedule(static) if (bytes > serial)
    for (long i = 0; i < bytes / block; i++) std::memcpy(to + i * block, from + i * block, block);
    copy_tail(from, to, bytes);
}

// Stores that go past the caches; `to` lies on a 64-byte boundary.
void copy_stream(const char* from, char* to, long bytes) {
#if defined(__x86_64__)
    auto stream_block = __builtin_cpu_supports("avx512f") ? stream_block_512 : stream_block_256;
#pragma omp parallel if (bytes > serial)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < bytes / block; i++) stream_block(from + i * block, to + i * block);
        _mm_sfence();
    }
    copy_tail(from, to, bytes);
#else
    copy_plain(from, to, bytes);
#endif
}

// pulse: seconds that the slowest thread takes for as many instructions as a core can do at once.
// hop: seconds from one thread's store to the other's load of it; 0 unless there are two.
void probe(double* pulse, double* hop) {
    constexpr int passes = 200;
    const int threads = omp_get_num_procs();
    alignas(64) std::atomic<int> ball{0};
    double slowest = 0, apart = 0;
#pragma omp parallel num_threads(threads) reduction(max : slowest, apart)
    {
        long sums[8] = {};
        double begin = omp_get_wtime();
        for (long i = 0; i < 8000; i++)
#pragma GCC unroll 8
            for (long& sum : sums) {
                sum += i;
                __asm__ volatile("" : "+r"(sum));
            }
        slowest = omp_get_wtime() - begin;
#pragma omp barrier
        if (threads == 2 && omp_get_num_threads() == 2) {
            begin = omp_get_wtime();
            for (int i = omp_get_thread_num(); i < passes; i += 2) {
                while (ball.load(std::memory_order_acquire) != i) {}
                ball.store(i + 1, std::memory_order_release);
            }
            apart = (omp_get_wtime() - begin) / passes;
        }
    }
    *pulse = slowest;
    *hop = apart;
}

}  // extern "C"

#if defined(WITH_ONEDNN)

#include <memory>
#include <unordered_map>

#include "oneapi/dnnl/dnnl.hpp"

namespace {

using namespace dnnl;
using tag = memory::format_tag;
using flags = normalization_flags;

enum Op { train, eval, backward };

// One operation in one layout, with all its arrays; running it is one call.
struct Norm {
    engine cpu{engine::kind::cpu, 0};
    stream queue{cpu};
    primitive op;
    std::unordered_map<int, memory> args;
    int result = DNNL_ARG_DST;
};

memory tensor(Norm& norm, const memory::desc& plain, const memory::desc& layout, const float* values) {
    memory from(plain, norm.cpu, const_cast<float*>(values)), to(layout, norm.cpu);
    reorder(from, to).execute(norm.queue, from, to);
    norm.queue.wait();
    return to;
}

memory vector(Norm& norm, const memory::desc& desc, const float* values) {
    memory to(desc, norm.cpu);
    std::memcpy(to.get_data_handle(), values, desc.get_size());
    return to;
}

void execute(Norm& norm) {
    norm.op.execute(norm.queue, norm.args);
    norm.queue.wait();
}

}  // namespace

extern "C" {

// x, dy (n, c, h, w) row by row; layout 0 nchw, 1 nhwc, 2 nChw16c, 3 nChw8c. Null where oneDNN refuses.
Norm* norm_new(int op, int layout, int relu, const long* shape, float eps, const float* x, const float* dy,
               const float* weight, const float* bias, const float* mean, const float* var) try {
    auto norm = std::make_unique<Norm>();
    const memory::dims dims(shape, shape + 4);
    const auto f32 = memory::data_type::f32;
    const memory::desc plain(dims, f32, tag::nchw);
    const tag layouts[] = {tag::nchw, tag::nhwc, tag::nChw16c, tag::nChw8c};
    const memory::desc layered(dims, f32, layouts[layout]);
    flags fused = flags::use_scale | flags::use_shift;
    if (relu) fused = fused | flags::fuse_norm_relu;
    if (op == eval) fused = fused | flags::use_global_stats;
    const auto kind = op == eval ? prop_kind::forward_inference : prop_kind::forward_training;
    batch_normalization_forward::primitive_desc forward(norm->cpu, kind, layered, layered, eps, fused);
    norm->args = {{DNNL_ARG_SRC, tensor(*norm, plain, layered, x)},
                  {DNNL_ARG_DST, memory(layered, norm->cpu)},
                  {DNNL_ARG_SCALE, vector(*norm, forward.weights_desc(), weight)},
                  {DNNL_ARG_SHIFT, vector(*norm, forward.weights_desc(), bias)},
                  {DNNL_ARG_MEAN, vector(*norm, forward.mean_desc(), mean)},
                  {DNNL_ARG_VARIANCE, vector(*norm, forward.variance_desc(), var)}};
    if (forward.workspace_desc().get_size())
        norm->args[DNNL_ARG_WORKSPACE] = memory(forward.workspace_desc(), norm->cpu);
    norm->op = batch_normalization_forward(forward);
    if (op != backward) return norm.release();
    if (relu) execute(*norm);  // fills the workspace
    norm->op = batch_normalization_backward(
        {norm->cpu, prop_kind::backward, layered, layered, layered, eps, fused, forward});
    norm->args.erase(DNNL_ARG_DST);
    norm->args.erase(DNNL_ARG_SHIFT);
    norm->args[DNNL_ARG_DIFF_DST] = tensor(*norm, plain, layered, dy);
    norm->args[DNNL_ARG_DIFF_SRC] = memory(layered, norm->cpu);
    norm->args[DNNL_ARG_DIFF_SCALE] = memory(forward.weights_desc(), norm->cpu);
    norm->args[DNNL_ARG_DIFF_SHIFT] = memory(forward.weights_desc(), norm->cpu);
    norm->result = DNNL_ARG_DIFF_SRC;
    return norm.release();
} catch (const dnnl::error&) {
    return nullptr;
}

void norm_run(Norm* norm) { execute(*norm); }

// The last run's output as (n, c, h, w).
void norm_result(Norm* norm, const long* shape, float* values) {
    memory& from = norm->args[norm->result];
    memory to({memory::dims(shape, shape + 4), memory::data_type::f32, tag::nchw}, norm->cpu, values);
    reorder(from, to).execute(norm->queue, from, to);
    norm->queue.wait();
}

void norm_free(Norm* norm) { delete norm; }

}  // extern "C"

#endif
