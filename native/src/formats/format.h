// What a weight format provides. A format is a struct of static members, compiled once for each
// instruction set; the kernels are templates over it.
//
//   kName            as users write it
//   kStepColumns     input columns of one 64-byte step of an activation row
//   kTileBytes       bytes of one tile: 16 output rows by kStepColumns
//   kInteger         int8 activations with scales, or bf16 ones without
//   kZeroPoint       integer formats: the stored value that means 0 (symmetric weights)
//   step             adds one step of MR activation rows (64 bytes apart) times NT tiles
//   tile_operand     the tile as a matrix-unit operand: itself, or expanded into the given 1024 bytes
//   pack             16 output rows into tiles, scales and zero points; 1 if a weight or a
//                    scale is not finite
//
// docs/adding-a-format.md walks through one.
#pragma once

#include "core/backend.h"
#include "kernels/inline.h"
#include "kernels/rows.h"

// Where a 16-column vector of packed values lands in a tile whose rows hold 4 bytes of each neuron: one
// 4-byte piece a tile row.
KTK_INLINE void scatter_quads(const uint8_t *bytes, int count, uint8_t *tile, int neuron, int first_row) {
  for (int q = 0; q < count; q++)
    __builtin_memcpy(tile + (first_row + q) * 64 + neuron * 4, bytes + 4 * q, 4);
}
