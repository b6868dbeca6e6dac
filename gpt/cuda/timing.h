// Times the parts of a pass by events, for a Profile: they are read once the GPU has passed them.
#pragma once

#include <vector>

#include "gpt/cuda/cuda.h"
#include "gpt/model/profile.h"

namespace lns::cuda {

struct EventTimes {
    struct Span {
        Cost cost;
        cudaEvent_t begin, end;
    };
    std::vector<Span> spans;
    std::vector<cudaEvent_t> unused;

    EventTimes() = default;
    EventTimes(const EventTimes&) = delete;
    ~EventTimes() {
        for (const Span& span : spans) cudaEventDestroy(span.begin), cudaEventDestroy(span.end);
        for (cudaEvent_t event : unused) cudaEventDestroy(event);
    }
    cudaEvent_t event() {
        cudaEvent_t event;
        if (unused.empty()) {
            CUDA(cudaEventCreate(&event));
        } else {
            event = unused.back();
            unused.pop_back();
        }
        return event;
    }
    // Adds all spans to the profile, if there is one. The stream must have been synchronized.
    void add_to(Profile* profile) {
        for (const Span& span : spans) {
            float milliseconds = 0;
            CUDA(cudaEventElapsedTime(&milliseconds, span.begin, span.end));
            if (profile) {
                Profile::Part& part = profile->part(span.cost.group, span.cost.name);
                part.calls++;
                part.seconds += milliseconds / 1e3;
                part.flops += span.cost.flops, part.bytes += span.cost.bytes;
            }
            unused.push_back(span.begin), unused.push_back(span.end);
        }
        spans.clear();
    }
};

// Times what is enqueued from here to the end of the scope; does nothing if `times` is null.
struct Timed {
    EventTimes* times;
    cudaStream_t stream;

    Timed(EventTimes* times, cudaStream_t stream, const Cost& cost) : times(times), stream(stream) {
        if (!times) return;
        times->spans.push_back({cost, times->event(), times->event()});
        CUDA(cudaEventRecord(times->spans.back().begin, stream));
    }
    ~Timed() noexcept(false) {
        if (times) CUDA(cudaEventRecord(times->spans.back().end, stream));
    }
    Timed(const Timed&) = delete;
};

} // namespace lns::cuda
