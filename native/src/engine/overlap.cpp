// Gathering, gate and up, and down of a batch with many rows an expert, as one section.
//
// Between sections workers wait for the last of them, and gathering waits for memory while the arithmetic
// units rest. Here each worker takes the next of all units in one order, in which what a unit needs comes so
// long before it that it is usually done: an expert's rows are gathered while the products of experts before
// it run, and its down projection follows when its gate and up have been taken by all workers' next units.
#include <algorithm>
#include <cstring>

#include "engine/batch.h"
#include "engine/moe.h"
#include "engine/sections.h"
#include "engine/turns.h"

namespace ktk {
namespace {

enum class Kind : uint8_t { zero, gather, gate_up, down };

struct Step {
  Kind kind;
  int32_t expert;  // of the route
  int64_t index;   // which of its units of this kind
};

constexpr int64_t kZeroedTokens = 64;  // of a unit
constexpr int32_t kGatheredRows = 64;

int32_t gather_units(const Route::Expert &expert) {
  // A single row lies where the token was quantised.
  return expert.rows == 1 ? 0 : divide_up(expert.rows, kGatheredRows);
}

// The order of one shard's units. `ahead`: units of gate and up between an expert's rows and what needs them,
// and between its intermediate and what needs that.
std::vector<Step> order_of(const Route &route, int64_t zeroing, bool gathering, int64_t columns_units,
                           const std::vector<int64_t> &first_piece, int64_t runs, int64_t ahead) {
  const auto experts = static_cast<int32_t>(route.experts.size());
  std::vector<Step> order;
  const auto add = [&](Kind kind, int32_t expert, int64_t units) {
    for (int64_t i = 0; i < units; i++) order.push_back({kind, expert, i});
  };
  int32_t gathered = gathering ? 0 : experts, finished = 0;
  const auto finish = [&](int64_t units_done) {
    for (; finished < experts && (finished + 1) * columns_units <= units_done; finished++) {
      const auto e = static_cast<size_t>(finished);
      add(Kind::down, finished, (first_piece[e + 1] - first_piece[e]) * runs);
    }
  };
  add(Kind::zero, 0, zeroing);
  const int64_t units = experts * columns_units;
  for (int64_t unit = 0; unit < units; unit++) {
    for (; gathered < experts && gathered * columns_units <= unit + ahead; gathered++)
      add(Kind::gather, gathered, gather_units(route.experts[static_cast<size_t>(gathered)]));
    order.push_back({Kind::gate_up, static_cast<int32_t>(unit / columns_units), unit % columns_units});
    finish(unit + 1 - ahead);
  }
  finish(units);
  return order;
}

}  // namespace

void Moe::overlapped(Batch &batch) const {
  WorkerPool &pool = context_->pool;
  const Route &route = batch.route;
  const int shards = store_.shard_count();
  // The rows of several shards are gathered before, by all of them: none waits for another.
  const bool gathering = shards == 1;
  if (!gathering) gather(batch);
  DownTurns by(*this, batch);
  const int64_t padded = by.panels * kPanelColumns;
  const int64_t zeroing = divide_up(batch.tokens, kZeroedTokens);

  struct Progress {
    std::vector<Step> order;
    std::vector<Countdown> gathered, activated;  // of each expert
    Countdown zeroed;
    int64_t columns_units = 0;
  };
  std::vector<Progress> progress(static_cast<size_t>(shards));
  std::vector<int64_t> units;
  for (int s = 0; s < shards; s++) {
    Progress &of = progress[static_cast<size_t>(s)];
    if (!store_.shard(s).empty()) {
      of.columns_units =
          divide_up(store_.shard(s).columns(), batch.shards[static_cast<size_t>(s)].unit_columns);
      of.zeroed.expect(zeroing);
      of.gathered = std::vector<Countdown>(route.experts.size());
      of.activated = std::vector<Countdown>(route.experts.size());
      for (size_t e = 0; e < route.experts.size(); e++) {
        of.gathered[e].expect(gathering ? gather_units(route.experts[e]) : 0);
        of.activated[e].expect(of.columns_units);
      }
      of.order =
          order_of(route, zeroing, gathering, of.columns_units, by.first_piece, by.runs, pool.threads(s));
    }
    units.push_back(static_cast<int64_t>(of.order.size()));
  }

  const auto unit = [&](int s, int worker, int64_t index) {
    Progress &of = progress[static_cast<size_t>(s)];
    const Step &step = of.order[static_cast<size_t>(index)];
    const auto e = static_cast<size_t>(step.expert);
    const auto label = [&](Stage stage) { return SpanLabel{stage, config_.layer_index}; };
    switch (step.kind) {
      case Kind::zero: {
        const SpanScope span = pool.unit_span(s, worker, label(Stage::down));
        const int64_t first = step.index * kZeroedTokens;
        const int64_t count = std::min(kZeroedTokens, batch.tokens - first);
        std::memset(batch.shards[static_cast<size_t>(s)].partial + first * padded, 0,
                    static_cast<size_t>(count * padded) * sizeof(float));
        of.zeroed.done();
        break;
      }
      case Kind::gather: {
        const SpanScope span = pool.unit_span(s, worker, label(Stage::gather));
        const Route::Expert &expert = route.experts[e];
        const auto first = static_cast<int32_t>(step.index) * kGatheredRows;
        for (int32_t row = first; row < std::min(first + kGatheredRows, expert.rows); row += kBlockRows)
          gather_block(batch, expert, row);
        of.gathered[e].done();
        break;
      }
      case Kind::gate_up: {
        of.gathered[e].await();
        const SpanScope span = pool.unit_span(s, worker, label(Stage::gate_up));
        gate_up_unit(batch, s, worker, step.expert * of.columns_units + step.index);
        of.activated[e].done();
        break;
      }
      case Kind::down: {
        of.zeroed.await();
        of.activated[e].await();
        const SpanScope span = pool.unit_span(s, worker, label(Stage::down));
        down_unit(batch, by, s, worker, by.first_piece[e] * by.runs + step.index);
        break;
      }
    }
  };
  run_in_order(pool, {Stage::section, config_.layer_index, SpanLabel::Of::units}, units.data(), unit);
}

}  // namespace ktk
