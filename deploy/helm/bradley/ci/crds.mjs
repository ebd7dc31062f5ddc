// Validates custom resources against the models that kubernetes-models makes of the projects' Go sources: `node crds.mjs FOLDER <documents.json`.
//
// FOLDER has node_modules. Standard input is a list of documents; the output is a list of their findings, empty for a valid one. Two things look
// at each document: the models' validators, at values (patterns, ranges, what is required), and the TypeScript compiler, at names: a field that
// the type does not have is an error in an object literal. Neither does the other's part.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const folder = resolve(process.argv[2]);
const require = createRequire(join(folder, "x.js"));
const ts = require("typescript");
const PACKAGES = {
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
  "keda.sh": "@kubernetes-models/keda",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
};

const documents = JSON.parse(readFileSync(0, "utf8"));
const findings = documents.map(() => []);
const lines = documents.map((document, i) => {
  const [group, version] = document.apiVersion.split("/");
  const path = `${PACKAGES[group]}/${group}/${version}/${document.kind}`;
  return { path, text: `const d${i}: import(${JSON.stringify(path)}).I${document.kind} = ${JSON.stringify(document)};` };
});

// The file exists in memory only; it lies in FOLDER, so that its imports are found there.
const file = join(folder, "documents.mts");
const source = lines.map((line) => line.text).join("\n") + "\nexport {};\n";
const options = { strict: true, noEmit: true, skipLibCheck: true, module: ts.ModuleKind.NodeNext, target: ts.ScriptTarget.ES2022, types: [] };
const host = ts.createCompilerHost(options);
const { readFile, fileExists, getSourceFile } = host;
host.fileExists = (name) => name === file || fileExists.call(host, name);
host.readFile = (name) => (name === file ? source : readFile.call(host, name));
host.getSourceFile = (name, ...rest) =>
  name === file ? ts.createSourceFile(name, source, ...rest) : getSourceFile.call(host, name, ...rest);
const program = ts.createProgram([file], options, host);
for (const diagnostic of ts.getPreEmitDiagnostics(program)) {
  const text = ts.flattenDiagnosticMessageText(diagnostic.messageText, " ");
  if (diagnostic.file?.fileName !== file) throw new Error(text);
  findings[diagnostic.file.getLineAndCharacterOfPosition(diagnostic.start).line].push(text);
}

for (const [i, { path }] of lines.entries()) {
  const model = await import(pathToFileURL(join(folder, "node_modules", `${path}.js`)));
  try {
    new model[documents[i].kind](documents[i]).validate();
  } catch (e) {
    findings[i].push(e.message);
  }
}
console.log(JSON.stringify(findings));
