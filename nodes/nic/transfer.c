/* transfer.c: VMMC send and fetch between exported buffers, and the notifications that sends ask for. */
#include <string.h>

#include "nic.h"

enum { TRANSFER_PIECE = 256 * 1024 }; /* bytes of a packet, and a transfer's share of a turn */

static struct packet *say(struct link *link, struct endpoint *e, const struct own_command *own, uint8_t type) {
  struct packet *p = link_next(link);
  p->type = type;
  p->to = own->import.far;
  p->from = (struct packet_end){ e->index, e->serial, 0, 0 };
  p->command = own->command.index;
  return p;
}

/* The next piece of a transfer, when its memory here may be touched; NULL: the command ended with an error. */
static struct packet *say_piece(struct link *link, struct endpoint *e, const struct own_command *own, uint8_t type) {
  const struct vmmc_command *c = &own->command;
  uint64_t length = c->length - own->moved;
  if (length > TRANSFER_PIECE) length = TRANSFER_PIECE;
  int error = utlb_translate(e, c->offset + own->moved, length);
  if (error) {
    command_complete(e, c->index, error, 0, 0, 0);
    return NULL;
  }
  struct packet *p = say(link, e, own, type);
  p->remote = c->remote_offset + own->moved;
  p->length = (uint32_t)length;
  return p;
}

static bool transmit_import(struct endpoint *e, struct own_command *own, struct link *link) {
  own->import.far = (struct packet_end){ 0 };
  struct packet *p = say(link, e, own, PACKET_IMPORT);
  p->export_id = own->command.export_id;
  memcpy(p->name, own->command.name, VMMC_NAME_MAX);
  link_push(link);
  own->state = COMMAND_ANSWER;
  return false;
}

static bool transmit_send(struct endpoint *e, struct own_command *own, struct link *link) {
  const struct vmmc_command *c = &own->command;
  struct packet *p = say_piece(link, e, own, PACKET_SEND);
  if (!p) return false;
  p->position = c->offset + own->moved;
  p->total = c->notify_length ? c->notify_length : c->length;
  p->tag = c->tag;
  uint64_t length = p->length;
  bool last = own->moved + length == c->length;
  p->flags = (uint8_t)((last ? PACKET_LAST : 0) | (c->flags & VMMC_SEND_NOTIFY ? PACKET_NOTIFY : 0) |
                       (c->flags & VMMC_SEND_MORE ? PACKET_MORE : 0));
  link_push(link);
  own->moved += length;
  COUNT(e, bytes_sent, length);
  if (!last) return true;
  own->state = COMMAND_ANSWER;
  COUNT(e, sends, 1);
  return false;
}

static bool transmit_fetch(struct endpoint *e, struct own_command *own, struct link *link) {
  struct packet *p = say_piece(link, e, own, PACKET_FETCH);
  if (!p) return false;
  p->position = own->moved;
  link_push(link);
  own->state = COMMAND_ANSWER;
  return false;
}

/* A long send takes several turns; one that was given after it must not overtake its last pieces. */
static bool has_predecessor(struct endpoint *e, const struct own_command *own) {
  if (own->command.op != VMMC_OP_SEND || !own->after) return false;
  const struct own_command *before = &e->own->command[(own->after - 1) % VMMC_COMMANDS];
  return before->command.index == own->after - 1 && before->state == COMMAND_WAITS;
}

bool transfer_transmit(struct work *work, struct link *link) {
  struct command_work *w = (struct command_work *)work;
  struct endpoint *e = w->endpoint;
  struct own_command *own = &e->own->command[w->place];
  if (e->dying || own->state != COMMAND_WAITS) return false;
  if (has_predecessor(e, own)) return true;
  switch (own->command.op) {
    case VMMC_OP_IMPORT: return transmit_import(e, own, link);
    case VMMC_OP_SEND: return transmit_send(e, own, link);
    default: return transmit_fetch(e, own, link);
  }
}

/* ---- at the exporter ---- */

static struct own_sender *senders_like(struct endpoint *e, uint32_t node, uint32_t serial) {
  uint32_t hash = (node << 16 ^ serial) * 2654435769u; /* Fibonacci hashing: Knuth, TAOCP 6.4 */
  return &e->own->sender[(hash >> 16) % (SENDERS / SENDER_WAYS) * SENDER_WAYS];
}

/* NULL: nothing of it has arrived, or it was forgotten. */
static struct own_sender *sender_find(struct endpoint *e, uint32_t node, uint32_t serial) {
  struct own_sender *s = senders_like(e, node, serial);
  for (int way = 0; way < SENDER_WAYS; way++)
    if (s[way].arrived && s[way].node == node && s[way].serial == serial) return &s[way];
  return NULL;
}

/* A place for one that has none: the same one, when it is asked for again because its NIC has died. */
static struct own_sender *sender_place(struct endpoint *e, uint32_t node, uint32_t serial, uint64_t arrivals) {
  struct own_sender *s = senders_like(e, node, serial);
  for (int way = 0; way < SENDER_WAYS; way++)
    if (!s[way].arrived) return &s[way];
  return &s[arrivals % SENDER_WAYS];
}

/* Sends of one program to this node arrive in the order of their indices. */
static bool arrived_before(struct endpoint *e, const struct packet *p, uint32_t node) {
  const struct own_sender *s = sender_find(e, node, p->from.serial);
  return s && p->command < s->arrived;
}

/* Carries out what own->arrival says.  Nothing in it depends on how often. */
static void arrive(struct endpoint *e) {
  struct own_arrival *a = &e->own->arrival;
  const struct vmmc_notification *told = &a->notification;
  struct vmmc_nic_export *n = (struct vmmc_nic_export *)(e->nic + VMMC_NIC_EXPORTS) + told->export_id;
  n->last_offset = told->offset;
  n->last_length = told->length;
  atomic_store_explicit(&n->arrivals, a->arrivals, memory_order_release);
  if (a->notify) {
    struct vmmc_notification *place = (struct vmmc_notification *)(e->nic + VMMC_NIC_NOTIFICATIONS);
    place[(a->notifications - 1) % VMMC_NOTIFICATIONS] = *told;
    atomic_store_explicit(&nic_header(e)->notifications, a->notifications, memory_order_release);
  }
  struct own_sender *s = sender_find(e, told->node, told->sender);
  if (!s) {
    s = sender_place(e, told->node, told->sender, a->arrivals);
    s->arrived = 0;
    in_order();
    s->node = told->node;
    s->serial = told->sender;
    in_order();
  }
  s->arrived = a->arriving;
  in_order();
  a->arriving = 0;
}

/* The last piece of a send is placed.  0 or ENOBUFS: nobody takes the notifications. */
static int arrived(struct endpoint *e, const struct packet *p, uint32_t node) {
  const struct vmmc_nic_export *n = (struct vmmc_nic_export *)(e->nic + VMMC_NIC_EXPORTS) + p->to.slot;
  uint64_t count = atomic_load_explicit(&nic_header(e)->notifications, memory_order_relaxed);
  /* acquire: the app has read the entries that it says it took */
  uint64_t taken = atomic_load_explicit(&app_header(e)->notifications_taken, memory_order_acquire);
  bool counts = !(p->flags & PACKET_MORE), notify = counts && (p->flags & PACKET_NOTIFY);
  if (notify && count - taken >= VMMC_NOTIFICATIONS) return ENOBUFS;
  struct own_arrival *a = &e->own->arrival;
  a->arrivals = atomic_load_explicit(&n->arrivals, memory_order_relaxed) + counts;
  a->notifications = count + 1;
  a->notify = notify;
  a->notification = (struct vmmc_notification){ .offset = p->remote + p->length - p->total, .length = p->total,
                                                .export_id = p->to.slot, .node = node, .tag = p->tag,
                                                .sender = p->from.serial };
  if (!counts) { /* a piece of a larger transfer: what arrived last stays as it is */
    a->notification.offset = n->last_offset;
    a->notification.length = n->last_length;
  }
  in_order();
  a->arriving = p->command + 1;
  in_order();
  arrive(e);
  if (notify) COUNT(e, notifications, 1);
  return 0;
}

void transfer_recover(struct endpoint *e) {
  if (e->own->arrival.arriving) arrive(e);
}

/* Copies the piece to where it belongs: the posted address, or the exported buffer. */
static int place(struct endpoint *e, const struct packet *p, const char *from) {
  const struct own_export *x = &e->own->export[p->to.slot];
  struct vmmc_nic_export *n = (struct vmmc_nic_export *)(e->nic + VMMC_NIC_EXPORTS) + p->to.slot;
  struct redirection r = redirection_of_export(e, p->to.slot);
  uint64_t at = p->remote, end = p->remote + p->length, redirected = 0;
  int error = 0;
  while (at < end && !error) {
    struct place to;
    uint64_t run = redirect_run(&r, at, end - at, &to);
    error = dma_copy(to.at ? to.at : e->app + VMMC_APP_HEAP + x->offset + at, from + (at - p->remote), run);
    if (error) break;
    at += run;
    if (to.at) {
      redirect_copied(&r, at);
      redirected += run;
    }
  }
  /* release: the bytes before the count that says they are there */
  atomic_store_explicit(&n->received, atomic_load_explicit(&n->received, memory_order_relaxed) + (at - p->remote),
                        memory_order_release);
  redirect_done(&r);
  COUNT(e, bytes_received, at - p->remote);
  COUNT(e, bytes_redirected, redirected);
  COUNT(e, bytes_default, at - p->remote - redirected);
  return error;
}

void transfer_send_arrived(struct link *link, const struct packet *p) {
  struct endpoint *e = endpoint_find(p->to.endpoint, p->to.serial);
  if (e && !e->dying && e->vmmc_committed && arrived_before(e, p, link_node(link))) {
    struct packet known = { .type = PACKET_SENT, .to = p->from, .command = p->command };
    if (p->flags & PACKET_LAST) link_reply(link, &known);
    return;
  }
  int error = export_check(e, p, VMMC_PERMIT_WRITE);
  if (!error && (p->position > VMMC_HEAP_BYTES || p->length > VMMC_HEAP_BYTES - p->position)) error = EFAULT;
  struct remote *remote = error ? NULL : remote_find(link_node(link), p->from.serial);
  if (!error && !remote) error = ECONNRESET;
  if (!error) error = place(e, p, link_carried() ? link_carried() : remote->app + VMMC_APP_HEAP + p->position);
  if (!error && link_withdrawn()) error = ETIMEDOUT;
  if (remote) remote_release(remote);
  if (!error && (p->flags & PACKET_LAST)) error = arrived(e, p, link_node(link));
  /* For notifications, and for who waits for a redirection to fill and looks at the export itself. */
  if (!error) wake_notification(e);
  if (error && e && !e->dying) COUNT(e, commands_rejected, 1);
  if (!error && !(p->flags & PACKET_LAST)) return;
  struct packet answer = { .type = PACKET_SENT, .error = (uint16_t)error, .to = p->from, .command = p->command };
  link_reply(link, &answer);
}

void transfer_fetch_arrived(struct link *link, const struct packet *p) {
  struct endpoint *e = endpoint_find(p->to.endpoint, p->to.serial);
  int error = export_check(e, p, VMMC_PERMIT_READ);
  struct packet answer = { .type = PACKET_FETCHED, .error = (uint16_t)error, .to = p->from, .from = p->to,
                           .command = p->command, .remote = p->position, .length = p->length };
  if (!error) answer.position = e->own->export[p->to.slot].offset + p->remote;
  link_reply(link, &answer);
}

/* ---- back at the fetcher: the exporter agrees that its memory is copied ---- */

void transfer_fetched(struct endpoint *e, const struct packet *p) {
  struct own_command *own = &e->own->command[p->command % VMMC_COMMANDS];
  const struct vmmc_command *c = &own->command;
  int error = p->error;
  if (c->op != VMMC_OP_FETCH || p->remote != own->moved) return; /* a piece answered twice */
  if (!error && (p->length > c->length - own->moved || p->position > VMMC_HEAP_BYTES - p->length)) error = EFAULT;
  if (!error) error = utlb_translate(e, c->offset + own->moved, p->length);
  struct remote *remote = error ? NULL : remote_find(own->import.node, own->import.far.serial);
  if (!error && !remote) error = ECONNRESET;
  if (!error) {
    const char *from = link_carried() ? link_carried() : remote->app + VMMC_APP_HEAP + p->position;
    error = dma_copy(e->app + VMMC_APP_HEAP + c->offset + own->moved, from, p->length);
  }
  if (remote) remote_release(remote);
  if (error) {
    command_complete(e, c->index, error, 0, own->moved, 0);
    return;
  }
  own->moved += p->length;
  COUNT(e, bytes_received, p->length);
  if (own->moved == c->length) {
    command_complete(e, c->index, 0, 0, own->moved, 0);
    return;
  }
  own->state = COMMAND_WAITS;
  struct link *link = link_to(own->import.node);
  if (link) link_enqueue(link, &e->command[p->command % VMMC_COMMANDS].work);
}
