// UMBEL=CHECKOUT node --test vectors.test.mjs: the golden vectors of tests/vectors, good and bad, as a device meets them.
//
// A device never opens what is sealed; the openers here are the tests' own.

import assert from 'node:assert/strict';
import { createDecipheriv, createPrivateKey, createPublicKey, sign } from 'node:crypto';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import test from 'node:test';

import { Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from '@hpke/core';

import { keyId, rawPublicKey, sha256 } from './identity.mjs';
import { checkDescriptor, verifyRound } from './private.mjs';
import { bindingOf, seal } from './sealing.mjs';
import { boundOf, encodeShare, headOf, masked, numbersOf, rotate, sealBody, sealReport, travelling } from './secure_sum.mjs';
import { encodeUpdate } from './training.mjs';
import { isSigned, verifyRelease } from './trust.mjs';
import { checkPlan, checkReply, decode, encode, loadProtos } from './wire.mjs';

const checkout = process.env.UMBEL;
loadProtos(path.join(checkout, 'protos'));

const load = (kind) => JSON.parse(readFileSync(path.join(checkout, 'tests/vectors', `${kind}.json`)));
const hex = (text) => Buffer.from(text, 'hex');
const floats = (bytes) => new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
const bytesOf = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);

// PKCS #8 around a raw private key, which node:crypto wants.
const PKCS8 = { ed25519: '302e020100300506032b657004220420', x25519: '302e020100300506032b656e04220420' };
const privateKey = (kind, raw) => createPrivateKey({ key: hex(PKCS8[kind] + raw), format: 'der', type: 'pkcs8' });
const publicOf = (kind, raw) => rawPublicKey(createPublicKey(privateKey(kind, raw)).export({ type: 'spki', format: 'pem' }));

async function open(raw, info, sealed) {
  const hpke = new CipherSuite({ kem: new DhkemX25519HkdfSha256(), kdf: new HkdfSha256(), aead: new Aes256Gcm() });
  const recipientKey = await hpke.kem.importKey('raw', hex(raw), false);
  const recipient = await hpke.createRecipientContext({ recipientKey, enc: sealed.subarray(0, 32), info });
  return Buffer.from(await recipient.open(sealed.subarray(32)));
}

// Each vector of a kind: `read` comes to the value that `fits` knows, or refuses with the vector's code.
function each(kind, read, fits, isOurs = () => true) {
  for (const vector of load(kind).vectors.filter(isOurs)) {
    test(`${kind}: ${vector.name}`, () => {
      if (vector.error) assert.throws(() => read(hex(vector.hex)), { code: vector.error });
      else fits(read(hex(vector.hex)), vector);
    });
  }
}

each('plan', (bytes) => checkPlan(decode('Plan', bytes)), (plan, { name, hex: text, value }) => {
  assert.deepEqual({ ...plan, kind: ['', 'train', 'evaluate'][plan.kind], seed: String(plan.seed) },
    { ...value, seed: BigInt(value.seed) > 2n ** 53n ? '18446744073709551615' : String(value.seed) });
  if (!name.includes('newer peer')) assert.equal(encode('Plan', plan).toString('hex'), text);
});

test('plan: a map in another order is encoded as ever', () => {
  const { hex: text, value } = load('plan').vectors[0];
  const hyperparameters = Object.fromEntries(Object.entries(value.hyperparameters).reverse());
  assert.equal(encode('Plan', { ...value, kind: 1, seed: '18446744073709551615', hyperparameters }).toString('hex'), text);
});

// Deltas are hints for devices that hold earlier versions; this one fetches whole files and doesn't read them.
each('check-in-reply', (bytes) => checkReply(decode('CheckInResponse', bytes)), (reply, { hex: text, value }) => {
  const { session_id, deadline } = value.reply;
  assert.equal(reply.assignment?.session_id, session_id);
  if (deadline) assert.equal(reply.assignment.deadline_ms, deadline * 1000);
  if (value.reply.reason) assert.equal(reply.retry.reason, value.reply.reason);
  assert.equal(encode('CheckInResponse', reply).toString('hex'), text);
}, ({ name }) => !/delta/.test(name));

const pinned = hex(load('signed-release').context.public_key);
each('signed-release', (bytes) => verifyRelease(decode('SignedRelease', bytes), pinned),
  ({ bundle_digest, issued_at_ms, ...release }, { value: { bundle, issued_at, ...value } }) => {
    assert.deepEqual(release, value);
    assert.deepEqual([bundle_digest, issued_at_ms], [bundle, issued_at * 1000]);
  });

for (const [kind, type] of [['check-in', 'CheckInRequest'], ['report-begin', 'ReportBegin']]) {
  for (const { name, hex: text } of load(kind).vectors.filter(({ value }) => value)) {
    test(`${kind}: ${name}`, () => assert.equal(encode(type, decode(type, hex(text))).toString('hex'), text));
  }
}

test('check-in: what a device says of itself', () => {
  const { hex: text, value } = load('check-in').vectors.find(({ name }) => name === 'least');
  assert.equal(encode('CheckInRequest', { ...value, capabilities: null, health: null }).toString('hex'), text);
});

// What a reader would refuse is never made: these are read without checks, and refused when they are to be sent.
const SENDABLE = /^(good|without metrics|delta with|weight (NaN|nought|below)|metric NaN)/;
each('update', (bytes) => {
  const { delta, weight, metrics } = decode('UpdateBody', bytes);
  return encodeUpdate({ delta: floats(delta), weight, metrics });
}, (bytes, { hex: text }) => assert.equal(bytes.toString('hex'), text), ({ name }) => SENDABLE.test(name));

const sealed = load('sealed');
const publicKey = hex(sealed.context.public_key);

test('sealed: what a report is bound to', () => {
  assert.equal(keyId(publicKey), sealed.context.key_id);
  assert.equal(bindingOf(publicKey, sealed.context.binding).toString('hex'), sealed.context.info);
});

for (const { name, hex: text, value, error } of sealed.vectors) {
  test(`sealed: ${name}`, async () => {
    const opened = open(sealed.context.private_key, hex(sealed.context.info), hex(text));
    if (error) await assert.rejects(opened);
    else assert.equal((await opened).toString('hex'), value);
  });
}

test('what is sealed here opens, and only for what it was bound to', async () => {
  const info = bindingOf(publicKey, sealed.context.binding);
  const text = await seal(publicKey, info, Buffer.from('an update'));
  assert.equal(text.length, 9 + 32 + 16);
  assert.equal(String(await open(sealed.context.private_key, info, text)), 'an update');
  const other = bindingOf(publicKey, { ...sealed.context.binding, round: 7 });
  await assert.rejects(open(sealed.context.private_key, other, text));
});

test('nothing is sealed to a key of small order', async () => {
  await assert.rejects(seal(Buffer.alloc(32), Buffer.alloc(0), Buffer.from('an update')), { code: 'seal-broken' });
});

const sums = load('secure_sum');
const keys = sums.private_keys;

function partsOf(report) {
  const length = report.readUInt32LE(0);
  return { ...decode('ReportHeader', report.subarray(4, 4 + length)), body: report.subarray(4 + length) };
}

const infoFor = (head, party, raw) => (
  Buffer.concat([head, Buffer.from(`${party}\0`), Buffer.from(keyId(publicOf('x25519', raw)))])
);

// Both halves of a report, opened with both private keys.
async function openBoth(report, head) {
  const { leader_capsule, helper_capsules: [capsule], body } = partsOf(report);
  const contentKey = await open(keys.leader_key, infoFor(head, 'leader', keys.leader_key), leader_capsule);
  const forHelper = await open(keys.helper_key, infoFor(head, 'helper', keys.helper_key), capsule);
  const decipher = createDecipheriv('aes-256-gcm', contentKey, Buffer.alloc(12));
  decipher.setAAD(Buffer.concat([head, sha256(capsule)]));
  decipher.setAuthTag(body.subarray(-16));
  const hidden = Buffer.concat([decipher.update(body.subarray(0, -16)), decipher.final()]);
  const [seed, commitment] = [forHelper.subarray(0, 32), forHelper.subarray(32, 64)];
  assert.deepEqual(commitment, sha256('umbel-2agg/1/commitment\0', contentKey, head));
  const isGood = isSigned(forHelper.subarray(64, 96), forHelper.subarray(168), Buffer.from('report\0'), head, commitment);
  assert.ok(isGood, 'the participant signed it');
  return { contentKey, capsule, forHelper, seed, hidden, body };
}

// A share's bytes as the arrays that it is made of.
function shareOf(round, bytes) {
  const at = 8 * (1 + round.lanes.length);
  const copy = Uint8Array.from(bytes).buffer;
  const Ring = round.ring_bits === 16 ? Uint16Array : Uint32Array;
  return { words: new BigInt64Array(copy, 0, at / 8), numbers: new Ring(copy, at) };
}

const signed = (numbers) => {
  const unused = 32 - 8 * numbers.BYTES_PER_ELEMENT;
  return Array.from(numbers, (value) => value << unused >> unused);
};

for (const vector of sums.vectors) {
  const descriptor = hex(vector.descriptor);
  const [rd, reportId] = [hex(vector.rd), hex(vector.report_id)];
  const head = headOf(rd, reportId);

  test(`secure sum, ${vector.name}: the descriptor is named, signed and read`, () => {
    assert.deepEqual(sha256(descriptor), rd);
    for (const party of ['leader', 'helper']) {
      const statement = [Buffer.from(`umbel-2agg/1/descriptor/${party}\0`), descriptor];
      const key = publicOf('ed25519', keys[`${party}_identity`]);
      assert.ok(isSigned(key, hex(vector[`${party}_signature`]), ...statement));
      assert.ok(!isSigned(key, hex(vector[`${party}_signature`]), Buffer.from('umbel-2agg/1'), ...statement));
    }
    assert.equal(encode('RoundDescriptor', checkDescriptor(descriptor)).toString('hex'), vector.descriptor);
  });

  test(`secure sum, ${vector.name}: the numbers that travel, and how they are rounded`, () => {
    const round = checkDescriptor(descriptor);
    const delta = floats(hex(vector.delta));
    const expected = floats(hex(vector.travels));
    const isShort = Math.hypot(...delta) <= round.clip_norm;
    const numbers = travelling({ ...round, clip_norm: isShort ? round.clip_norm : 1e9 }, delta);
    assert.equal(numbers.length, expected.length);
    numbers.forEach((value, at) => assert.ok(Math.abs(value - expected[at]) < 1e-6, `number ${at}`));
    const clear = shareOf(round, hex(vector.cleartext));
    const made = encodeShare(round, delta, Number(clear.words[0]), { loss: 12.5, correct: 9 });
    assert.deepEqual(made.words, clear.words);
    const theirs = signed(clear.numbers);
    signed(made.numbers).forEach((value, at) => assert.ok(Math.abs(value - theirs[at]) <= 1, `number ${at}`));
  });

  test(`secure sum, ${vector.name}: the mask, both halves, the body`, async () => {
    const clear = shareOf(checkDescriptor(descriptor), hex(vector.cleartext));
    assert.equal(masked(clear, hex(vector.seed), head).toString('hex'), vector.masked);
    const { contentKey, capsule, forHelper, hidden, seed, body } = await openBoth(hex(vector.report), head);
    assert.equal(contentKey.toString('hex'), keys.content_key);
    assert.deepEqual([seed.toString('hex'), hidden.toString('hex')], [vector.seed, vector.masked]);
    assert.deepEqual(sealBody(contentKey, head, capsule, hidden), body);
    const participant = {
      key: privateKey('ed25519', keys.participant).export({ type: 'pkcs8', format: 'pem' }),
      certificate: { not_after_ms: forHelper.readBigInt64LE(96), signature: forHelper.subarray(104, 168) },
    };
    const report = await sealReport({ round: checkDescriptor(descriptor), rd }, participant, reportId, clear);
    assert.equal(report.length, hex(vector.report).length);
    const ours = await openBoth(report, head);
    assert.deepEqual(ours.forHelper.subarray(64, 168), forHelper.subarray(64, 168));
    assert.deepEqual(ours.hidden, masked(clear, ours.seed, head));
    assert.notDeepEqual(ours.seed, seed);
  });

  for (const bad of vector.bad.filter(({ error }) => error === 'seal-broken')) {
    test(`secure sum, ${vector.name}: ${bad.name}`, async () => {
      const { rd: named, report_id } = partsOf(hex(bad.report));
      await assert.rejects(openBoth(hex(bad.report), headOf(named, report_id)));
    });
  }
}

for (const { numbers, public_seed, at, values } of sums.rotations) {
  test(`secure sum: ${numbers} numbers, rotated, block after block`, () => {
    const vector = Float64Array.from({ length: numbers }, (_, place) => ((37 * place) % 101 - 50) / 64);
    const turned = rotate(vector, hex(public_seed));
    assert.equal(turned.length, numbersOf({ sent: numbers, rotated: true }));
    at.forEach((place, index) => assert.ok(Math.abs(turned[place] - values[index]) < 1e-5, `number ${place}`));
  });
}

// A descriptor of the vectors with other fields, as bytes.
const altered = (changes) => (
  encode('RoundDescriptor', { ...decode('RoundDescriptor', hex(sums.vectors[0].descriptor)), ...changes })
);

for (const [name, changes, code] of [
  ['without head-room', { level: 2 ** 27 }, 'out-of-bounds'],
  ['whose noise has no head-room', { noise_variance: 2 ** 57 }, 'out-of-bounds'],
  ['whose lane has no head-room', { lanes: [{ name: 'loss', bound: 2 ** 46 }] }, 'out-of-bounds'],
  ['for a cohort of one', { minimum: 1 }, 'out-of-bounds'],
  ['without a clip', { clip_norm: 0 }, 'out-of-bounds'],
  ['with one key for both', { helper_keys: [publicOf('x25519', keys.leader_key)] }, 'malformed-message'],
  ['of another suite', { suite: 'umbel-2agg/2' }, 'malformed-message'],
  ['that sends more than there is', { sent: 21 }, 'out-of-bounds'],
]) {
  test(`a round ${name} is refused`, () => assert.throws(() => checkDescriptor(altered(changes)), { code }));
}

test('a round with a field that is new here is refused', () => {
  const newer = Buffer.concat([altered({}), Buffer.from('e00601', 'hex')]);
  assert.throws(() => checkDescriptor(newer), { code: 'malformed-message' });
});

// A round that both aggregators signed, and a device that it was written for.
const PLAN = { kind: 1, epochs: 3, batch_size: 16, max_weight: 8, hyperparameters: { mu: 0.5, lr: 0.25 } };
const DEVICE = { population: 'wrists', release_key: publicOf('ed25519', keys.leader_identity) };
const HELPER = { card: { identity: publicOf('ed25519', keys.helper_identity).toString('hex') } };
const BASE = 'ab'.repeat(32);
const [BEGIN, END] = [1_000_000, 2_000_000];
const ROUND = {
  population: 'wrists', task: 'learn', round: 7, kind: 1, base: BASE, not_before_ms: BEGIN, not_after_ms: END, minimum: 5,
  plan: sha256(encode('Plan', PLAN)).toString('hex'),
};

function believed(changes, { now = 1_500_000, floors = {} } = {}) {
  const descriptor = altered({ ...ROUND, ...changes });
  const private_round = { descriptor };
  for (const party of ['leader', 'helper']) {
    const statement = Buffer.concat([Buffer.from(`umbel-2agg/1/descriptor/${party}\0`), descriptor]);
    private_round[`${party}_signature`] = sign(null, statement, privateKey('ed25519', keys[`${party}_identity`]));
  }
  const assignment = { task: 'learn', round: 7, plan: PLAN, private_round };
  return verifyRound(assignment, { bundle_digest: BASE }, DEVICE, HELPER, floors, now);
}

test('a round that is the assignment\'s own is believed, however the plan\'s map travelled', () => {
  const { round, rd } = believed({});
  assert.deepEqual([round.task, rd.length], ['learn', 32]);
});

for (const [field, value] of Object.entries({
  population: 'ankles', task: 'other', round: 8, base: 'cd'.repeat(32), plan: 'cd'.repeat(32),
})) {
  test(`a signed round of another ${field} is not this device's`, () => {
    assert.throws(() => believed({ [field]: value }), { code: 'not-allowed' });
  });
}

test('a signed round of another kind is not this device\'s', () => {
  assert.throws(() => believed({ kind: 2, size: 0, sent: 0 }), { code: 'not-allowed' });
});

test('a round before and after its time, too small, or too long for this device is not joined', () => {
  assert.throws(() => believed({}, { now: BEGIN - 1 }), { code: 'wrong-state' });
  assert.throws(() => believed({}, { now: END + 1 }), { code: 'round-closed' });
  assert.throws(() => believed({ minimum: 4 }), { code: 'cohort-too-small' });
  assert.throws(() => believed({}, { floors: { longest_seconds: 999 } }), { code: 'out-of-bounds' });
});

test('a round with noise gets numbers of a bounded norm', () => {
  const round = { ...checkDescriptor(altered({ noise_variance: 4, sent: 20, clip_norm: Math.sqrt(5), scale: 1 })), lanes: [] };
  // Each is rounded up or down with equal chance, which often makes them too long.
  const halves = new Float32Array(20).fill(0.5);
  for (let tries = 0; tries < 500; tries += 1) {
    assert.ok(Math.hypot(...signed(encodeShare(round, halves, 1, {}).numbers)) <= boundOf(round, 1, 20));
  }
});

test('the bins of a histogram move by their bound together', () => {
  const lanes = ['age[0]', 'age[1]', 'loss'].map((name) => ({ name, bound: 6 }));
  const round = { ...checkDescriptor(altered({})), lanes };
  const { words } = encodeShare(round, floats(hex(sums.vectors[0].delta)), 1, { 'age[0]': 9, 'age[1]': 3, loss: 7 });
  assert.deepEqual(Array.from(words), [1n, 294912n, 98304n, 393216n]);  // 1, 4.5, 1.5 and 6
});
