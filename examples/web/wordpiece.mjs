// BERT's tokens: words without case and accents, and the longest pieces of them that are known.

const PUNCTUATION = /([\p{P}$+<=>^`|~])/u;
const CHINESE = /(\p{Script=Han})/u;
const LONGEST = 100; // letters of a word that is looked up

/**
 * Makes a tokenizer of a vocabulary.
 *
 * @param {string} text of `vocab.txt`, a piece a line.
 * @param {number} most tokens of a text.
 * @returns a function: text -> its ids, with [CLS] and [SEP] around them.
 */
export function tokenizer(text, most) {
  const ids = new Map(text.trimEnd().split("\n").map((piece, place) => [piece, place]));
  const known = (piece) => ids.get(piece) ?? ids.get("[UNK]");
  return (input) => {
    const pieces = words(input).flatMap((word) => split(word, ids)).slice(0, most - 2);
    return ["[CLS]", ...pieces, "[SEP]"].map(known);
  };
}

function words(input) {
  const plain = input.replace(/[\p{Cc}\p{Cf}]/gu, (c) => (/\s/.test(c) ? " " : ""));
  const bare = plain.toLowerCase().normalize("NFD").replace(/\p{Mn}/gu, "");
  const apart = bare.split(/\s+/u).flatMap((word) => word.split(PUNCTUATION));
  return apart.flatMap((word) => word.split(CHINESE)).filter((word) => word !== "");
}

function split(word, ids) {
  if ([...word].length > LONGEST) return ["[UNK]"];
  const found = [];
  for (let start = 0; start < word.length; ) {
    const before = start === 0 ? "" : "##";
    let end = word.length;
    while (end > start && !ids.has(before + word.slice(start, end))) end -= 1;
    if (end === start) return ["[UNK]"];
    found.push(before + word.slice(start, end));
    start = end;
  }
  return found;
}
