// Private rounds: being a participant that a helper knows, believing a round's descriptor, and reporting to it.

import { sign } from 'node:crypto';

import { OpenConnection } from './channel.mjs';
import { malformed, mayPass, refuseUnless } from './errors.mjs';
import { makeSigningKey, rawPublicKey, sha256 } from './identity.mjs';
import { encodeShare, sealReport, SECURE_SUM } from './secure_sum.mjs';
import { isSigned } from './trust.mjs';
import { checkDigest, checkName, decode, encode, unknownFields } from './wire.mjs';

export { SECURE_SUM };

const RENEW_BEFORE = 30 * 86_400_000;
const SECOND = 1000;
const KIND_TRAIN = 1;
const KIND_EVALUATE = 2;

// What a device asks of a round, whatever its coordinator and its helper have agreed on.
const FLOORS = { minimum_cohort: 5, longest_seconds: 48 * 3600 };

export function readCard(text) {
  const { address, identity, certificate } = JSON.parse(text);
  const isText = [address, identity, certificate].every((part) => typeof part === 'string' && part);
  if (!isText || !/^[0-9a-f]{64}$/.test(identity)) throw malformed('not a helper card');
  return { address, identity, certificate };
}

function proofFor(population, key) {
  const [name, length] = [Buffer.from(population), Buffer.alloc(4)];
  length.writeUInt32LE(name.length);
  return sign(null, Buffer.concat([Buffer.from('umbel-participant/1/proof\0'), length, name, rawPublicKey(key)]), key);
}

// Redeems a helper's token. The key is kept before it is sent: a lost answer costs no token.
export async function enrolAtHelper(home, card, token, population) {
  const key = (await home.read('participant.pem'))?.toString() ?? makeSigningKey();
  await home.write('participant.pem', key);
  return withHelper(card, async (connection) => {
    const request = { token, population, public_key: rawPublicKey(key), proof: proofFor(population, key) };
    await keep(home, card, key, await connection.enrolParticipant(request));
  });
}

async function withHelper(card, ask) {
  const connection = new OpenConnection(card.address, card.certificate);
  try {
    return await ask(connection);
  } finally {
    connection.close();
  }
}

async function keep(home, card, key, { certificate }) {
  const isOurs = certificate?.public_key.equals(rawPublicKey(key));
  refuseUnless(isOurs, 'certificate-refused', 'the helper certified another key; nothing was kept');
  await home.save('helper.json', { card, certificate });
}

// The helper that this device pinned and its certificate there; null for a device of public rounds.
export async function participantOf(home) {
  const pinned = await home.load('helper.json');
  return pinned && { ...pinned, key: (await home.read('participant.pem')).toString() };
}

// A certificate that ends soon is renewed; until it has ended, a helper that is away does no harm.
export async function renewAtHelper(home, population, now) {
  const pinned = await participantOf(home);
  if (!pinned || now < pinned.certificate.not_after_ms - RENEW_BEFORE) return;
  const { card, key, certificate } = pinned;
  const request = { population, certificate, proof: proofFor(population, key) };
  try {
    await withHelper(card, async (connection) => keep(home, card, key, await connection.renewParticipant(request)));
  } catch (error) {
    if (!mayPass(error) || now >= certificate.not_after_ms) throw error;
  }
}

// A round that both aggregators signed, that is the assignment's own, and that keeps to this device's floors.
export function verifyRound(assignment, release, identity, participant, floors, now) {
  const { private_round: signed } = assignment;
  refuseUnless(signed, 'not-allowed', 'this device pinned a helper and sends shares only');
  const { descriptor } = signed;
  const helperKey = Buffer.from(participant.card.identity, 'hex');
  for (const [party, key, signature] of [
    ['leader', identity.release_key, signed.leader_signature], ['helper', helperKey, signed.helper_signature],
  ]) {
    const isGood = isSigned(key, signature, Buffer.from(`${SECURE_SUM}/descriptor/${party}\0`), descriptor);
    refuseUnless(isGood, 'signature-invalid', `the round isn't signed by the pinned key of the ${party}`);
  }
  const round = checkDescriptor(descriptor);
  const { task, plan } = assignment;
  const expected = {
    population: identity.population, task, round: assignment.round, kind: plan.kind, base: release.bundle_digest,
    plan: sha256(encode('Plan', plan)).toString('hex'),
  };
  for (const [field, value] of Object.entries(expected)) {
    refuseUnless(round[field] === value, 'not-allowed', `the round's ${field} isn't the assignment's`);
  }
  checkFloors(round, { ...FLOORS, ...floors }, now);
  return { round, rd: sha256(descriptor) };
}

function checkFloors(round, floors, now) {
  refuseUnless(now >= round.not_before_ms, 'wrong-state', "the round isn't valid yet: is this machine's clock right?");
  refuseUnless(now <= round.not_after_ms, 'round-closed', 'the round is over');
  refuseUnless(round.minimum >= floors.minimum_cohort, 'cohort-too-small',
    `the round may sum ${round.minimum} reports; this device asks for ${floors.minimum_cohort} at least`);
  refuseUnless(round.not_after_ms - round.not_before_ms <= floors.longest_seconds * SECOND, 'out-of-bounds',
    `the round may last longer than ${floors.longest_seconds} seconds`);
}

// Decodes a descriptor. Each field is a promise that somebody has to keep, so one with fields that nobody here knows is
// refused; and its numbers must leave room for the sum.
export function checkDescriptor(bytes) {
  const round = decode('RoundDescriptor', bytes);
  const isKnown = unknownFields('RoundDescriptor', bytes).length === 0;
  refuseUnless(isKnown, 'malformed-message', 'the round has fields that are new here: update');
  refuseUnless(round.suite === SECURE_SUM, 'malformed-message', `the round is of ${round.suite}`);
  for (const field of ['population', 'task']) checkName(round[field], `the round's ${field}`);
  for (const field of ['base', 'plan']) checkDigest(round[field], `the round's ${field}`);
  const { helper_keys: helpers, leader_key: leader, public_seed: seed, lanes } = round;
  const hasKeys = helpers.length === 1 && [leader, ...helpers].every(({ length }) => length === 32);
  const isSplit = hasKeys && !leader.equals(helpers[0]);
  refuseUnless(isSplit && seed.length === 16, 'malformed-message', 'a round without two keys and a seed');
  const names = new Set(lanes.map(({ name }) => name));
  refuseUnless(names.size === lanes.length && !names.has(''), 'malformed-message', 'two lanes of one name');
  refuseUnless(lanes.length <= 256, 'out-of-bounds', `${lanes.length} lanes`);
  checkSizes(round);
  checkHeadRoom(round);
  return round;
}

function checkSizes({ kind, size, sent, ring_bits, clip_norm, scale, max_weight, minimum, maximum, level }) {
  const within = (value, least, most, what) => (
    refuseUnless(value >= least && value <= most, 'out-of-bounds', `${what} is ${value}, not ${least} to ${most}`)
  );
  refuseUnless(kind === KIND_TRAIN || kind === KIND_EVALUATE, 'malformed-message', `a round of kind ${kind}`);
  refuseUnless(ring_bits === 16 || ring_bits === 32, 'out-of-bounds', `a ring of ${ring_bits} bits`);
  within(size, 0, kind === KIND_TRAIN ? 2 ** 28 : 0, 'the size of a delta');
  within(sent, Math.min(1, size), size, 'how much of it is sent');
  within(clip_norm, Number.MIN_VALUE, Number.MAX_VALUE, 'the clip');
  within(scale, Number.MIN_VALUE, Number.MAX_VALUE, 'the scale');
  within(max_weight, 1, 2 ** 16, 'the largest weight');
  within(level, 1, 2 ** 31, 'the level');
  within(maximum, 2, 2 ** 20, 'the largest cohort');
  within(minimum, 2, maximum, 'the smallest cohort');
}

function checkHeadRoom({ level, max_weight, maximum, noise_variance, ring_bits, lanes }) {
  const hasRoom = (largest, variance, bits) => largest * maximum + 8 * Math.sqrt(Number(variance)) < 2 ** (bits - 1);
  const isWide = hasRoom(level * max_weight, noise_variance, ring_bits);
  refuseUnless(isWide, 'out-of-bounds', "the round's ring has no room for its sum");
  for (const { name, bound, noise_variance: variance } of lanes) {
    const isBounded = bound > 0 && hasRoom(bound * 2 ** 16, variance, 64);
    refuseUnless(isBounded, 'out-of-bounds', `${name} has no room for its sum`);
  }
}

export async function sealPrivately({ round, rd }, participant, reportId, { delta, metrics, examples }, plan) {
  const size = plan.kind === KIND_TRAIN ? delta.length : 0;
  refuseUnless(round.size === size, 'weights-mismatch', `the round is of ${round.size} numbers, the model has ${size}`);
  const steps = Math.round(Math.min(examples, plan.max_weight) * round.max_weight / plan.max_weight);
  const weight = Math.min(Math.max(1, steps), round.max_weight);
  return sealReport({ round, rd }, participant, reportId, encodeShare(round, delta, weight, metrics));
}
