#include "transports/nccl/nccl_aborts.h"

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

namespace foldcp::nccl {

namespace {

using namespace std::chrono_literals;

constexpr int kGroups = 22200;  // the first NCCL that takes aborts in a group
constexpr auto kGather = 20ms;  // what is lost at once is asked for within this time
constexpr auto kPatience = 2s;  // for a call under way; one that hangs is what an abort ends

struct Job {
  comm_t comm;
  std::shared_ptr<Calls> calls;
};

struct Queue {
  std::mutex mutex;
  std::vector<Job> jobs;
  std::shared_ptr<Apart> batch;  // that will take them
};

Queue& queue() {
  static auto* queue = new Queue;  // threads may still be at work when the process exits
  return *queue;
}

void run(const Api& api, std::vector<Job> jobs) {
  for (auto& job : jobs) {
    std::unique_lock<Calls> lock(*job.calls, kPatience);
  }
  int version = 0;
  api.GetVersion(&version);
  if (version >= kGroups) {
    api.GroupStart();
    for (auto& job : jobs) api.CommAbort(job.comm);
    api.GroupEnd();
    return;
  }
  // Each tells its kernels to end before it waits for anything: at once, none waits for another.
  std::vector<std::thread> threads;
  for (auto& job : jobs) threads.emplace_back([&api, comm = job.comm] { api.CommAbort(comm); });
  for (auto& thread : threads) thread.join();
}

}  // namespace

std::shared_ptr<Apart> Aborts::begin(const Api& api, comm_t comm, std::shared_ptr<Calls> calls) {
  Queue& q = queue();
  std::lock_guard<std::mutex> lock(q.mutex);
  q.jobs.push_back({comm, std::move(calls)});
  if (!q.batch) {
    q.batch = std::make_shared<Apart>([&api, &q] {
      std::this_thread::sleep_for(kGather);
      std::vector<Job> jobs;
      {
        std::lock_guard<std::mutex> lock(q.mutex);
        jobs = std::exchange(q.jobs, {});
        q.batch = nullptr;
      }
      run(api, std::move(jobs));
    });
  }
  return q.batch;
}

}  // namespace foldcp::nccl
