// A stand-in for libnccl between processes of one machine, in host memory, for
// tests/fabric/test_nccl.py.
//
// A message is a file in $MOCK_NCCL_DIR: its sender writes it, its receiver takes it away, and only
// then is the send done, as is a large one of NCCL's. Nothing happens in the background:
// ncclCommGetAsyncError moves things on. A message of another size is never taken: both ends hang.
//
// Read when a communicator is made:
//   MOCK_NCCL_POLLS     how often it says ncclInProgress before anything goes on
//   MOCK_NCCL_ERROR_AT  the exchange (from 0, of each communicator) that ends in ncclRemoteError
//   MOCK_NCCL_HANG_AT   the exchange that is never done
//   MOCK_NCCL_INIT      "fail": an error at once; "hang": never done
//   MOCK_NCCL_CORRUPT   changes what is received beyond this many bytes of a message
// An abort waits for the GPU, on which exchanges of other communicators of this process may be
// under way: those end when they are aborted too, before or in the same group.
// Read at each call: MOCK_NCCL_ABORT ("hang": never returns), MOCK_NCCL_VERSION, and MOCK_NCCL_LOG,
// a file that gets a line per call. Lines that begin with "misuse" say what a caller of NCCL may
// not do.
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

enum Result {
  kSuccess,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage,
  kRemoteError,
  kInProgress
};

struct UniqueId {
  unsigned char bytes[128];
};

struct Config {  // of NCCL 2.18
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char* net_name;
  int split_share;
};

struct Op {
  bool send;
  char* data;
  size_t bytes;
  int peer;
  std::string file;
  bool written = false, done = false;
};

std::mutex log_mutex;

void log(const std::string& line) {
  const char* path = getenv("MOCK_NCCL_LOG");
  if (!path) return;
  std::lock_guard<std::mutex> lock(log_mutex);
  std::ofstream(path, std::ios::app) << line + "\n";
}

int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}

std::string folder() {
  const char* path = getenv("MOCK_NCCL_DIR");
  return path ? path : "/tmp";
}

// Half of an id follows from the other: one that was cut or changed on its way is noticed.
unsigned char expected(const UniqueId& id, int i) {
  return static_cast<unsigned char>(3 * id.bytes[i - 64] + i);
}

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

// Never seen half written.
void put(const std::string& path, const char* data, size_t bytes) {
  std::ofstream(path + ".part", std::ios::binary).write(data, bytes);
  rename((path + ".part").c_str(), path.c_str());
}

enum class Phase { idle, forming, exchanging, closing };

struct Communicator {
  int serial, size, rank;
  std::string id;
  int polls, error_at, hang_at, corrupt;
  bool hang_init;
  Phase phase = Phase::forming;
  int left = 0, exchanges = -1;
  Result error = kSuccess;
  std::atomic<bool> gone{false}, pending{false};
  std::vector<Op> ops;
  std::vector<int> sent, received;
  std::mutex mutex;
  std::atomic<int> users{0};

  std::string name() const { return std::to_string(serial); }
  std::string file(int from, int to, int n) const {
    return folder() + "/" + id + "." + std::to_string(from) + "." + std::to_string(to) + "." +
           std::to_string(n);
  }
  std::string member(int r) const { return folder() + "/" + id + ".member." + std::to_string(r); }

  // NCCL takes one call at a time; polling is the only exception.
  struct Use {
    explicit Use(Communicator& c) : c(c) {
      if (c.users.fetch_add(1)) log("misuse two-calls-at-once " + c.name());
    }
    ~Use() { c.users.fetch_sub(1); }
    Communicator& c;
  };

  void begin(Phase next) {
    phase = next;
    pending = next == Phase::exchanging;
    left = polls;
  }

  // Goes on with what is under way. Memory is touched as late as NCCL may.
  Result advance() {
    if (error != kSuccess) return error;
    if (phase == Phase::idle) return kSuccess;
    if (left > 0) {
      --left;
      return kInProgress;
    }
    if (phase == Phase::forming && !formed()) return kInProgress;
    if (phase == Phase::exchanging) {
      if (exchanges == error_at) return error = kRemoteError;
      if (exchanges == hang_at || !exchanged()) return kInProgress;
      ops.clear();
    }
    phase = Phase::idle;
    pending = false;
    return kSuccess;
  }

  bool formed() {
    if (hang_init) return false;
    for (int r = 0; r < size; ++r) {
      if (!exists(member(r))) return false;
    }
    return true;
  }

  bool exchanged() {
    bool all = true;
    for (auto& op : ops) {
      if (!op.done) op.done = op.send ? give(op) : take(op);
      all = all && op.done;
    }
    return all;
  }

  bool give(Op& op) {
    if (!op.written) put(op.file, op.data, op.bytes);
    op.written = true;
    return !exists(op.file);
  }

  bool take(Op& op) {
    struct stat found;
    if (stat(op.file.c_str(), &found) != 0) return false;
    if (static_cast<size_t>(found.st_size) != op.bytes) return false;
    std::ifstream(op.file, std::ios::binary).read(op.data, op.bytes);
    for (size_t at = corrupt; at < op.bytes; at += 4096) op.data[at] ^= 1;
    return unlink(op.file.c_str()) == 0;
  }
};

std::atomic<int> made{0}, groups{0};
std::mutex all_mutex;
std::vector<Communicator*> all;  // of this process
thread_local int depth = 0;
thread_local std::vector<std::pair<Communicator*, std::vector<Op>>> group;
thread_local std::vector<Communicator*> aborts;  // of the group

bool others_pending() {
  std::lock_guard<std::mutex> lock(all_mutex);
  for (auto* c : all) {
    if (c->pending && !c->gone) return true;
  }
  return false;
}

// The communicators are marked: their own kernels end.
void finish_aborts() {
  if (aborts.empty()) return;
  std::string number = std::to_string(++groups);
  for (auto* c : std::exchange(aborts, {})) log("Abort " + c->name() + " group:" + number);
  const char* how = getenv("MOCK_NCCL_ABORT");
  while (others_pending() || (how && !strcmp(how, "hang"))) usleep(1000);
}

bool usable(Communicator* c, const char* call) {
  if (c && !c->gone) return true;
  log(std::string("misuse ") + call + " of a communicator that is gone");
  return false;
}

Result add(bool send, void* data, size_t bytes, int type, int peer, Communicator* c) {
  const char* call = send ? "Send" : "Recv";
  if (!usable(c, call)) return kInvalidArgument;
  if (type != 0 || peer < 0 || peer >= c->size || peer == c->rank) return kInvalidArgument;
  if (depth == 0) {
    log(std::string("misuse ") + call + " outside a group");
    return kInvalidUsage;
  }
  if (group.empty() || group.back().first != c) group.push_back({c, {}});
  group.back().second.push_back({send, static_cast<char*>(data), bytes, peer, ""});
  return kSuccess;
}

Result launch(Communicator& c, std::vector<Op> ops) {
  Communicator::Use use(c);
  std::lock_guard<std::mutex> lock(c.mutex);
  if (c.error != kSuccess) return c.error;
  if (c.phase != Phase::idle) {
    log("misuse an exchange while another call is in progress " + c.name());
    return kInvalidUsage;
  }
  ++c.exchanges;
  std::string line = "Exchange " + c.name();
  for (auto& op : ops) {
    int n = op.send ? c.sent[op.peer]++ : c.received[op.peer]++;
    op.file = op.send ? c.file(c.rank, op.peer, n) : c.file(op.peer, c.rank, n);
    line += std::string(op.send ? " send:" : " recv:") + std::to_string(op.peer) + ":" +
            std::to_string(op.bytes);
  }
  log(line);
  c.ops = std::move(ops);
  c.begin(Phase::exchanging);
  return c.advance();
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) {
  *version = number("MOCK_NCCL_VERSION", 22907);
  return kSuccess;
}

Result ncclGetUniqueId(UniqueId* id) {
  std::random_device random;
  for (int i = 0; i < 64; ++i) id->bytes[i] = static_cast<unsigned char>(random());
  for (int i = 64; i < 128; ++i) id->bytes[i] = expected(*id, i);
  return kSuccess;
}

Result ncclCommInitRankConfig(Communicator** out, int size, UniqueId id, int rank, Config* config) {
  *out = nullptr;
  for (int i = 64; i < 128; ++i) {
    if (id.bytes[i] != expected(id, i)) return kInvalidArgument;
  }
  if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->version < 21800) {
    return kInvalidArgument;
  }
  if (rank < 0 || rank >= size) return kInvalidArgument;
  if (config->blocking != 0) log("misuse a communicator that blocks");
  auto* c = new Communicator{++made, size, rank};  // never freed: a stale handle is recognised
  char hex[17];
  for (int i = 0; i < 8; ++i) snprintf(hex + 2 * i, 3, "%02x", id.bytes[i]);
  c->id = hex;
  c->polls = number("MOCK_NCCL_POLLS", 0);
  c->error_at = number("MOCK_NCCL_ERROR_AT", INT_MAX);
  c->hang_at = number("MOCK_NCCL_HANG_AT", INT_MAX);
  c->corrupt = number("MOCK_NCCL_CORRUPT", INT_MAX);
  const char* init = getenv("MOCK_NCCL_INIT");
  c->hang_init = init && !strcmp(init, "hang");
  {
    std::lock_guard<std::mutex> lock(all_mutex);
    all.push_back(c);
  }
  // The library reads it once, before its first communicator.
  const char* order = getenv("NCCL_LAUNCH_ORDER_IMPLICIT");
  if (!order || strcmp(order, "1")) log("misuse communicators without an order of launches");
  c->sent.resize(size);
  c->received.resize(size);
  log("Init " + c->name() + " " + c->id + " " + std::to_string(rank) + " " + std::to_string(size) +
      " ctas:" + std::to_string(config->max_ctas));
  *out = c;
  if (init && !strcmp(init, "fail")) return c->error = kSystemError;
  put(c->member(rank), "", 0);
  c->begin(Phase::forming);
  return kInProgress;
}

Result ncclCommGetAsyncError(Communicator* c, Result* state) {
  if (!usable(c, "GetAsyncError")) return kInvalidArgument;
  std::lock_guard<std::mutex> lock(c->mutex);
  *state = c->advance();
  return kSuccess;
}

Result ncclCommFinalize(Communicator* c) {
  if (!usable(c, "Finalize")) return kInvalidArgument;
  Communicator::Use use(*c);
  std::lock_guard<std::mutex> lock(c->mutex);
  log("Finalize " + c->name());
  if (c->phase != Phase::idle) log("misuse Finalize while a call is in progress");
  c->begin(Phase::closing);
  return kInProgress;
}

Result ncclCommDestroy(Communicator* c) {
  if (!usable(c, "Destroy")) return kInvalidArgument;
  Communicator::Use use(*c);
  std::lock_guard<std::mutex> lock(c->mutex);
  log("Destroy " + c->name());
  if (c->phase != Phase::idle) log("misuse Destroy while a call is in progress");
  c->gone = true;
  return kSuccess;
}

Result ncclCommAbort(Communicator* c) {
  if (!usable(c, "Abort")) return kInvalidArgument;
  Communicator::Use use(*c);
  std::lock_guard<std::mutex> lock(c->mutex);
  c->gone = true;
  aborts.push_back(c);
  if (depth == 0 || number("MOCK_NCCL_VERSION", 22907) < 22200) finish_aborts();
  return kSuccess;
}

const char* ncclGetErrorString(Result result) {
  return result == kRemoteError   ? "remote process exited or there was a network error"
         : result == kSystemError ? "unhandled system error"
                                  : "invalid usage";
}

const char* ncclGetLastError(Communicator*) { return "the stand-in was told to fail"; }

Result ncclGroupStart() {
  ++depth;
  return kSuccess;
}

Result ncclGroupEnd() {
  if (depth == 0) return kInvalidUsage;
  if (--depth > 0) return kSuccess;
  finish_aborts();
  Result worst = kSuccess;
  for (auto& [c, ops] : std::exchange(group, {})) {
    if (!usable(c, "GroupEnd")) return kInvalidArgument;
    Result result = launch(*c, std::move(ops));
    if (worst == kSuccess || worst == kInProgress) worst = result == kSuccess ? worst : result;
  }
  return worst;
}

Result ncclSend(const void* data, size_t bytes, int type, int peer, Communicator* c, void*) {
  return add(true, const_cast<void*>(data), bytes, type, peer, c);
}

Result ncclRecv(void* data, size_t bytes, int type, int peer, Communicator* c, void*) {
  return add(false, data, bytes, type, peer, c);
}

}  // extern "C"
