// One forward on its way through the sections of a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "engine/moe.h"
#include "engine/route.h"
#include "engine/scratch.h"
#include "engine/turns.h"

namespace ktk {

// What a forward that trains adds. Operands are laid out for all rows of the batch, tiles for each expert
// of the route in turn.
struct TrainingBatch {
  bool lora;
  Gemm gate_up_rank;       // the adapters' second product: K is the rank
  uint8_t *gate_up_input;  // its rows: tokens through A, scaled
  Gemm down_rank;
  uint8_t *down_input;
  uint8_t *down_tiles;  // B of down
  int64_t down_tile_bytes;
  struct Shard {
    uint8_t *gate_up_tiles;  // B of gate and up, this shard's columns
    int64_t gate_up_tile_bytes;
    uint16_t *saved;  // gate and up before the activation, [rows][2 * columns]; null: not saved
    Gemm z_gemm;
    uint8_t *z;  // the intermediate in bf16, where the format's own is not; null: not wanted
  };
  std::vector<Shard> shards;
};

struct Moe::Batch {
  ktk_forward_args args;
  int64_t tokens;
  const Route &route;
  Scratch &scratch;

  Rows by_token;  // quantised input
  Rows by_row;    // gathered

  struct Shard {
    Rows intermediate;
    int32_t unit_columns;  // of the intermediate, made by one unit of work
    // Where units are parts of groups: [expert][group][rows][columns of a group], and [expert][group] of
    // parts that are not done. Else null.
    float *group_values;
    int32_t *parts_left;
    float *scratch;  // of each worker: gate_up's, then the tokens' sums
    int64_t scratch_floats;
    float *partial;  // [tokens][hidden, padded]: several shards, or shared sums; else null
  };
  std::vector<Shard> shards;
  int64_t down_panels;  // output panels of one unit
  // Workers take experts by turns and add to the same sums; else each has the sums of some columns to itself.
  bool shared_sums;
  const TrainingBatch *training = nullptr;  // null: inference
};

// The down projection in pieces of the rows of one expert and runs of columns, which add to shared sums by
// turns.
struct Moe::DownTurns {
  struct Piece {
    const Route::Expert *expert;
    int32_t first_row, last_row;
  };
  int64_t panels, runs;              // of the output: columns of 16, and runs of them
  std::vector<Piece> pieces;         // expert by expert
  std::vector<int64_t> first_piece;  // of each expert of the route, and their number
  std::vector<Turns> turns;          // of each shard

  DownTurns(const Moe &moe, const Batch &batch);
};

Rows rows_from(const Rows &rows, const Gemm &gemm, int64_t row);
Weights weights_of(const ExpertStore &store, int shard, int32_t expert, ktk_part weight);

}  // namespace ktk
