// What the operators see of an engine, whatever its backend is.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"

namespace foldcp {

class Endpoint {
 public:
  virtual ~Endpoint() = default;
  virtual int64_t open() = 0;
  virtual void begin(int64_t flight) = 0;  // again, when everything of it has arrived
  virtual void post(int64_t flight, int slot, std::vector<Message> sends,
                    std::vector<Message> recvs, int64_t tag, bool forwards) = 0;
  // False when it has not arrived within the time; `arrive` does not block the host for long then.
  virtual bool reached(int64_t flight, int slot, double seconds) = 0;
  virtual void arrive(int64_t flight, int slot) = 0;
  virtual void land(int64_t flight) = 0;
  // Makes all exchanges fail, now and later; returns at once, whatever state a device is in.
  virtual void abort(const std::string& message) = 0;
  // Ends what is under way, before the endpoint is destroyed; throws when it does not end in time.
  virtual void close() = 0;
  virtual std::string error() = 0;
  virtual void set_deadline(double seconds) = 0;
  virtual void trace(bool on) = 0;
  virtual std::vector<int64_t> take_trace() = 0;
};

template <class B>
class EngineEndpoint : public Endpoint {
 public:
  explicit EngineEndpoint(std::unique_ptr<B> backend)
      : backend_(std::move(backend)), engine_(*backend_) {}

  // Flights that have landed are used again: their events cost time to make.
  int64_t open() override {
    if (!landed_.empty()) {
      int64_t again = landed_.back();
      landed_.pop_back();
      begin(again);
      return again;
    }
    flights_[++last_];
    return last_;
  }
  void begin(int64_t flight) override { flights_.at(flight).steps = 0; }
  void post(int64_t flight, int slot, std::vector<Message> sends, std::vector<Message> recvs,
            int64_t tag, bool forwards) override {
    engine_.post(flights_.at(flight), slot, {std::move(sends), std::move(recvs), tag}, forwards);
  }
  bool reached(int64_t flight, int slot, double seconds) override {
    auto& f = flights_.at(flight);
    return !f.posted[slot] || backend_->reached(f.arrived[slot], seconds);
  }
  void arrive(int64_t flight, int slot) override { engine_.arrive(flights_.at(flight), slot); }
  void land(int64_t flight) override {
    engine_.land(flights_.at(flight));
    landed_.push_back(flight);
  }
  void abort(const std::string& message) override { backend_->abort(message); }
  void close() override { backend_->close(); }
  std::string error() override { return backend_->error(); }
  void set_deadline(double seconds) override { backend_->set_deadline(seconds); }
  void trace(bool on) override { backend_->trace.enable(on); }
  std::vector<int64_t> take_trace() override { return backend_->trace.take(); }
  B& backend() { return *backend_; }

 private:
  std::unique_ptr<B> backend_;
  Engine<B> engine_;
  std::unordered_map<int64_t, typename Engine<B>::Flight> flights_;
  std::vector<int64_t> landed_;
  int64_t last_ = 0;
};

}  // namespace foldcp
