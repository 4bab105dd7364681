/*
 * chance: what a wire does to each transmission of each packet, asked in one order or another, at one time or another.
 *
 *     chance SEED FROM NODE backwards|forwards    a line for each packet and attempt: lost, or how it arrives
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../nodes/nic/link.h"

enum { PACKETS = 500, ATTEMPTS = 3, ASKED = PACKETS * ATTEMPTS };

int main(int count, char **argument) {
  if (count != 5) return 2;
  static char told[ASKED][64];
  static struct node_state state;
  static struct vmmc_pub pub;
  static struct link_queue out;
  static struct link link = { .out = &out };
  uint32_t from = (uint32_t)atoi(argument[2]);
  nic.node = (uint32_t)atoi(argument[3]);
  nic.state = &state;
  nic.pub = &pub;
  state.wire[from] = (struct vmmc_control_wire){
    .kind = VMMC_CONTROL_WIRE, .from = from, .up = 1, .seed = strtoull(argument[1], NULL, 10), .loss_ppb = 200000000,
    .corrupt_ppb = 100000000, .duplicate_ppb = 100000000, .reorder_ppb = 100000000, .delay_ns = 1000000,
    .jitter_ns = 500000,
  };
  bool backwards = !strcmp(argument[4], "backwards");
  struct wire wire = { 0 };
  wire_become(&wire, from);
  uint64_t now_ns = backwards ? 7000000000u : 1;
  for (int i = 0; i < ASKED; i++, now_ns += 10000000) {
    int asked = backwards ? ASKED - 1 - i : i;
    struct link_frame frame = { .kind = FRAME_RESEND, .attempt = (uint32_t)(asked % ATTEMPTS) };
    wire_enter(&link, &wire, &frame, (uint64_t)asked / ATTEMPTS, 1000, now_ns);
    struct flight flight;
    int arrivals = 0;
    while (wire_arrived(&link, &wire, UINT64_MAX, &flight))
      snprintf(told[asked], sizeof *told, "%d after %llu ns, %llx", ++arrivals,
               (unsigned long long)(flight.arrives_ns - now_ns), (unsigned long long)flight.flips);
    if (!arrivals) strcpy(told[asked], "lost");
  }
  for (int asked = 0; asked < ASKED; asked++) printf("%d.%d: %s\n", asked / ATTEMPTS, asked % ATTEMPTS, told[asked]);
  wire_end(&wire);
  return 0;
}
