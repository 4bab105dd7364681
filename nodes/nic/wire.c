/*
 * wire.c: what a link runs over.  It is perfect unless the daemon says otherwise; faults are here and
 * nowhere else, at the end where packets arrive.
 */
#include "nic.h"

void wire_set(const struct vmmc_control_wire *settings) {
  if (settings->from >= nic.nodes || settings->from == nic.node) {
    log_event("warning", "the daemon told of a wire from node %u", settings->from);
    return;
  }
  uint64_t at = offsetof(struct node_state, wire) + settings->from * sizeof *settings;
  if (!segment_commit(nic.state_fd, at, sizeof *settings)) return; /* said in the log */
  /* Kept where a successor finds it, before it is told anything: a wire that is cut stays cut. */
  nic.state->wire[settings->from] = *settings;
  log_event("info", "the wire from node%u is set anew", settings->from);
}
