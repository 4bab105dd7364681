/* export.c: buffers that programs of this node export, and imports of buffers of other nodes. */
#include <string.h>

#include "nic.h"

static struct own_export *find_by_name(struct endpoint *e, const char *name) {
  for (uint32_t id = 0; id < VMMC_EXPORTS; id++)
    if (e->own->export[id].used && !strncmp(e->own->export[id].name, name, VMMC_NAME_MAX)) return &e->own->export[id];
  return NULL;
}

/* By name on the whole node: names of exports are the node's. */
static struct own_export *find_on_node(const char *name, struct endpoint **e_out) {
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    struct own_export *x = e->dying || !e->vmmc_committed ? NULL : find_by_name(e, name);
    if (!x) continue;
    *e_out = e;
    return x;
  }
  return NULL;
}

int export_make(struct endpoint *e, struct own_command *own) {
  const struct vmmc_command *command = &own->command;
  if (command->export_id >= VMMC_EXPORTS || !command->length) return EINVAL;
  if (!(command->permissions & (VMMC_PERMIT_READ | VMMC_PERMIT_WRITE))) return EINVAL;
  if (command->permissions & ~(uint32_t)(VMMC_PERMIT_READ | VMMC_PERMIT_WRITE)) return EINVAL;
  if (command->node != VMMC_ANY_NODE && command->node >= nic.nodes) return EHOSTUNREACH;
  struct own_export *x = &e->own->export[command->export_id];
  if (x->used) return own->effected == command->index + 1 ? 0 : EEXIST;
  struct endpoint *other;
  if (command->name[0] && find_on_node(command->name, &other)) return EEXIST;
  if (!utlb_present(e, command->offset, command->length)) return EFAULT;
  x->generation++;
  x->offset = command->offset;
  x->length = command->length;
  x->permissions = command->permissions;
  x->node = command->node;
  memcpy(x->name, command->name, VMMC_NAME_MAX);
  x->name[VMMC_NAME_MAX] = 0;
  struct vmmc_nic_export *n = (struct vmmc_nic_export *)(e->nic + VMMC_NIC_EXPORTS) + command->export_id;
  atomic_store_explicit(&n->received, 0, memory_order_relaxed);
  atomic_store_explicit(&n->arrivals, 0, memory_order_relaxed);
  command_begin(own);
  x->used = 1;
  return 0;
}

int export_end(struct endpoint *e, struct own_command *own) {
  uint32_t id = own->command.export_id;
  if (id >= VMMC_EXPORTS) return ENOENT;
  if (!e->own->export[id].used) return own->effected == own->command.index + 1 ? 0 : ENOENT;
  command_begin(own);
  e->own->export[id].used = 0;
  return 0;
}

void export_end_all(struct endpoint *e) {
  if (!e->vmmc_committed) return;
  for (uint32_t id = 0; id < VMMC_EXPORTS; id++) e->own->export[id].used = 0;
}

void export_answer(struct link *link, const struct packet *p) {
  struct packet answer = { .type = PACKET_IMPORTED, .to = p->from, .command = p->command };
  struct endpoint *e = NULL;
  struct own_export *x = NULL;
  if (p->name[0]) {
    x = find_on_node(p->name, &e);
  } else { /* by number, see VMMC_EXPORT_NUMBER */
    uint32_t index = p->export_id / VMMC_EXPORTS;
    e = index < VMMC_ENDPOINTS_MAX ? nic.endpoint[index] : NULL;
    if (e && !e->dying && e->vmmc_committed && e->own->export[p->export_id % VMMC_EXPORTS].used)
      x = &e->own->export[p->export_id % VMMC_EXPORTS];
  }
  if (!x) {
    answer.error = ENOENT;
  } else if (x->node != VMMC_ANY_NODE && x->node != link_node(link)) {
    answer.error = EPERM;
    COUNT(e, commands_rejected, 1);
  } else {
    answer.from = (struct packet_end){ e->index, e->serial, (uint32_t)(x - e->own->export), x->generation };
    answer.total = x->length;
    answer.flags = (uint8_t)x->permissions;
  }
  link_reply(link, &answer);
}

/* A peer wants to move bytes [remote, remote + length) of an export: may it, and are they there? */
int export_check(struct endpoint *e, const struct packet *p, uint32_t permission) {
  if (!e || e->dying || !e->vmmc_committed || p->to.slot >= VMMC_EXPORTS) return ECONNRESET;
  struct own_export *x = &e->own->export[p->to.slot];
  if (!x->used || x->generation != p->to.generation) return ECONNRESET;
  if (!(x->permissions & permission)) return EPERM;
  if (p->remote > x->length || p->length > x->length - p->remote) return EINVAL;
  return utlb_translate(e, x->offset + p->remote, p->length);
}
