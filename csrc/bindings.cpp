// The one binding file: torch operators over the fused update, and a small Python module that tells what was built.
//
// Operators rather than plain functions, so that torch.compile, torch.export and the profiler see what they change.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cmath>
#include <optional>

#ifdef LWAS_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "chunks.h"
#include "update.h"

namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

// `like`'s own memory order, or a copy in it. What was copied and is to be written back is noted.
class InOrder {
 public:
  Tensor read(const Tensor& tensor, const Tensor& like) {
    if (tensor.is_contiguous() && like.is_contiguous()) return tensor;
    if (tensor.strides() == like.strides()) return tensor;
    return keep(at::empty_like(like, tensor.options()).copy_(tensor));
  }
  Tensor write(const Tensor& tensor, const Tensor& like) {
    Tensor same = read(tensor, like);
    if (!same.is_same(tensor)) changed_.emplace_back(tensor, same);
    return same;
  }
  // A parameter whose elements do not fill a block of memory: work on a contiguous copy.
  Tensor dense(const Tensor& tensor) {
    if (tensor.is_contiguous() || tensor.is_non_overlapping_and_dense()) return tensor;
    Tensor copy = keep(tensor.contiguous());
    changed_.emplace_back(tensor, copy);
    return copy;
  }
  void write_back() {
    for (auto& [original, copy] : changed_) const_cast<Tensor&>(original).copy_(copy);
  }

 private:
  Tensor keep(Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }
  std::vector<Tensor> kept_;  // until the launches are enqueued
  std::vector<std::pair<Tensor, Tensor>> changed_;
};

lwas::Kind kind_of(const Tensor& tensor, int64_t i) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return lwas::Kind::kFloat32;
    case at::kBFloat16:
      return lwas::Kind::kBFloat16;
    case at::kHalf:
      return lwas::Kind::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "params[", i, "] is ", tensor.scalar_type(),
                       "; the fused update takes float32, bfloat16 "
                       "and float16");
  }
}

void check_one(const Tensor& tensor, const char* list, int64_t i, const Tensor& param, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, list, "[", i, "] is sparse");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, list, "[", i, "] is ", tensor.scalar_type(), ", not ", dtype);
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), list, "[", i, "] is of shape ", tensor.sizes(),
                    ", its parameter of ", param.sizes());
  TORCH_CHECK_VALUE(tensor.device() == param.device(), list, "[", i, "] is on ", tensor.device(), ", its parameter on ",
                    param.device());
}

const float* scalar_pointer(const OptionalTensor& tensor, const char* name, const Tensor& table) {
  if (!tensor) return nullptr;
  TORCH_CHECK_VALUE(tensor->numel() == 1 && tensor->scalar_type() == at::kFloat && tensor->device() == table.device(),
                    name, " must be one float32 number on ", table.device());
  return tensor->const_data_ptr<float>();
}

double* double_pointer(const Tensor& tensor, const char* name, const Tensor& table) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kDouble && tensor.is_contiguous() && tensor.device() == table.device(),
                    name, " must be contiguous float64 on ", table.device());
  return tensor.mutable_data_ptr<double>();
}

// Arguments as the schema has them, checked before anything is changed.
struct Arguments {
  TensorList params, grads, firsts, seconds;
  const Tensor &table, &steps, &where;
  at::ArrayRef<double> control;
  bool warming, maximize;
  const OptionalTensor &lr, &grad_scale, &found_inf, &totals, &scratch;
  bool settles;
};

lwas::Call call_of(lwas::Rule rule, const lwas::Options& options, const Arguments& a, InOrder& memory) {
  const int64_t count = a.params.size();
  const bool adam = rule == lwas::Rule::kAdamW || rule == lwas::Rule::kFreeAdamW;
  TORCH_CHECK_VALUE(int64_t(a.grads.size()) == count && int64_t(a.firsts.size()) == count &&
                        (!adam || int64_t(a.seconds.size()) == count),
                    "the lists are of different lengths");
  TORCH_CHECK_VALUE(a.table.dim() == 2 && a.table.size(1) == lwas::kColumns && a.table.is_contiguous() &&
                        a.table.scalar_type() == at::kFloat,
                    "table must be a contiguous float32 tensor of ", int(lwas::kColumns), " columns");
  TORCH_CHECK_VALUE(a.steps.dim() == 1 && a.steps.is_contiguous() && a.steps.scalar_type() == at::kFloat &&
                        a.steps.device() == a.table.device(),
                    "steps must be a contiguous float32 vector on the table's device");
  TORCH_CHECK_VALUE(a.where.dim() == 2 && a.where.size(0) == count && a.where.size(1) == 4 && a.where.is_cpu() &&
                        a.where.scalar_type() == at::kLong && a.where.is_contiguous(),
                    "where must be a contiguous int64 tensor on the CPU, one (row, place, decays, elements) for each "
                    "parameter");
  TORCH_CHECK_VALUE(a.control.size() == 8, "control has ", a.control.size(), " numbers, not 8");
  const int64_t* where = a.where.const_data_ptr<int64_t>();

  lwas::Call call;
  call.rule = rule;
  call.options = options;
  const auto control = [&](int i) { return float(a.control[i]); };
  call.control = {control(0), scalar_pointer(a.lr, "lr_tensor", a.table),
                  control(1), control(2),
                  control(3), a.warming,
                  control(4), control(5),
                  control(6), control(7)};
  call.sign = a.maximize ? -1.0f : 1.0f;
  call.table = a.table.mutable_data_ptr<float>();
  call.steps = a.steps.mutable_data_ptr<float>();
  call.grad_scale = scalar_pointer(a.grad_scale, "grad_scale", a.table);
  call.found_inf = scalar_pointer(a.found_inf, "found_inf", a.table);
  int64_t left = 0;  // elements of the layer that no tensor of the call has had yet
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& param = a.params[i];
    kind_of(param, i);
    TORCH_CHECK_VALUE(param.device() == a.table.device(), "params[", i, "] is on ", param.device(), ", the table on ",
                      a.table.device());
    check_one(a.grads[i], "grads", i, param, param.scalar_type());
    check_one(a.firsts[i], "first moments", i, param, at::kFloat);
    if (adam) check_one(a.seconds[i], "second moments", i, param, at::kFloat);
    const int64_t row = where[4 * i], place = where[4 * i + 1], elements = where[4 * i + 3];
    TORCH_CHECK_VALUE(row >= (i ? where[4 * i - 4] : 0) && row < a.table.size(0), "where[", i, "]: row ", row,
                      " is out of order or of range");
    TORCH_CHECK_VALUE(place >= 0 && place < a.steps.size(0), "where[", i, "]: place ", place, " is out of range");
    const bool first = i == 0 || row != where[4 * i - 4];
    left = (first ? elements : left) - param.numel();
    TORCH_CHECK_VALUE(left >= 0 && (first || elements == where[4 * i - 1]), "where[", i, "]: its layer cannot have ",
                      elements, " elements");
  }
  call.slots.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor param = memory.dense(a.params[i]);
    call.slots.push_back({param.mutable_data_ptr(), memory.read(a.grads[i], param).const_data_ptr(),
                          memory.write(a.firsts[i], param).mutable_data_ptr<float>(),
                          adam ? memory.write(a.seconds[i], param).mutable_data_ptr<float>() : nullptr, param.numel(),
                          where[4 * i + 3], int32_t(where[4 * i]), int32_t(where[4 * i + 1]), where[4 * i + 2] != 0,
                          kind_of(param, i)});
  }
  if (a.totals) {
    const int64_t layers = lwas::layers_of(call);
    TORCH_CHECK_VALUE(a.totals->dim() == 2 && a.totals->size(0) == layers && a.totals->size(1) == lwas::kTotals,
                      "totals must be of shape [", layers, ", ", lwas::kTotals, "], not ", a.totals->sizes());
    call.totals = double_pointer(*a.totals, "totals", a.table);
  }
  TORCH_CHECK_VALUE(a.totals || !a.settles, "settles takes totals");
  call.settles = a.settles;
  return call;
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, grain, body);
}

void bump(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void run(lwas::Rule rule, const lwas::Options& options, const Arguments& arguments) {
  if (arguments.params.empty()) return;
  InOrder memory;
  const Tensor& table = arguments.table;
#ifdef LWAS_CUDA
  const c10::cuda::OptionalCUDAGuard guard(table.is_cuda() ? std::optional<c10::Device>(table.device()) : std::nullopt);
#endif
  const lwas::Call call = call_of(rule, options, arguments, memory);
  if (table.is_cpu()) {
    lwas::update_cpu(call, parallel_for);
  } else {
#ifdef LWAS_CUDA
    std::vector<int64_t> sizes;
    for (const lwas::Slot& slot : call.slots) sizes.push_back(slot.size);
    const int64_t size = lwas::scratch_size(sizes);
    TORCH_CHECK_VALUE(!call.totals || (arguments.scratch && arguments.scratch->numel() >= size), "scratch must be of ",
                      size, " numbers");
    const Tensor scratch = call.totals ? *arguments.scratch : at::empty({size}, table.options().dtype(at::kDouble));
    lwas::update_cuda(call, double_pointer(scratch, "scratch", table), c10::cuda::getCurrentCUDAStream().stream());
#else
    TORCH_CHECK(false, "lwas_fast was built without CUDA, and the parameters are on ", table.device());
#endif
  }
  memory.write_back();
  for (TensorList list : {arguments.params, arguments.firsts, arguments.seconds}) bump(list);
  for (const Tensor& tensor : {arguments.table, arguments.steps}) bump(tensor);
  for (const OptionalTensor& tensor : {arguments.totals, arguments.scratch}) {
    if (tensor) bump(*tensor);
  }
}

double log_or_infinity(double beta) { return beta > 0 ? std::log(beta) : -INFINITY; }

void adamw_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, const Tensor& table,
                const Tensor& steps, const Tensor& where, at::ArrayRef<double> control, bool warming, double beta1,
                double beta2, double eps, double weight_decay, bool maximize, bool schedule_free,
                const OptionalTensor& lr, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                const OptionalTensor& totals, const OptionalTensor& scratch, bool settles) {
  const lwas::Options options{float(1 - beta1),       float(1 - beta2),       float(eps), float(weight_decay),
                              log_or_infinity(beta1), log_or_infinity(beta2), beta1};
  run(schedule_free ? lwas::Rule::kFreeAdamW : lwas::Rule::kAdamW, options,
      {params, grads, exp_avgs, exp_avg_sqs, table, steps, where, control, warming, maximize, lr, grad_scale, found_inf,
       totals, scratch, settles});
}

void sgd_step(TensorList params, TensorList grads, TensorList momenta, const Tensor& table, const Tensor& steps,
              const Tensor& where, at::ArrayRef<double> control, bool warming, double momentum, double weight_decay,
              bool maximize, bool schedule_free, const OptionalTensor& lr, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf, const OptionalTensor& totals, const OptionalTensor& scratch,
              bool settles) {
  const double log_beta = log_or_infinity(momentum);
  const lwas::Options options{float(1 - momentum), 1, 0, float(weight_decay), log_beta, log_beta, momentum};
  run(schedule_free ? lwas::Rule::kFreeSgd : lwas::Rule::kSgd, options,
      {params, grads, momenta, TensorList(), table, steps, where, control, warming, maximize, lr, grad_scale, found_inf,
       totals, scratch, settles});
}

// Nothing is returned and no shape changes: all there is to say of tensors without data.
void adamw_step_meta(TensorList, TensorList, TensorList, TensorList, const Tensor&, const Tensor&, const Tensor&,
                     at::ArrayRef<double>, bool, double, double, double, double, bool, bool, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool) {
}
void sgd_step_meta(TensorList, TensorList, TensorList, const Tensor&, const Tensor&, const Tensor&,
                   at::ArrayRef<double>, bool, double, double, bool, bool, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool) {}

}  // namespace

// With `totals`, (layers, 4) float64, a step is taken in two calls, for ranks that hold a part of every tensor each:
// the first makes a pass and writes what it sums up of each layer (squared length of its direction, squared size of its
// weights, elements that are skipped, more than 0 if a move was over its limit), and the second, which `settles`, takes
// these sums over all ranks. All else must be as in the first call, `scratch` too, which CUDA asks for.
TORCH_LIBRARY(lwas_fast, m) {
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!) table, Tensor(e!) steps, Tensor where, float[] control, bool warming, float beta1, float beta2, "
      "float eps, float weight_decay, bool maximize, bool schedule_free, Tensor? lr_tensor=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(f!)? totals=None, Tensor(g!)? scratch=None, "
      "bool settles=False) -> ()");
  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(d!) table, Tensor(e!) steps, "
      "Tensor where, float[] control, bool warming, float momentum, float weight_decay, bool maximize, "
      "bool schedule_free, Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor(f!)? totals=None, Tensor(g!)? scratch=None, bool settles=False) -> ()");
}

TORCH_LIBRARY_IMPL(lwas_fast, CPU, m) {
  m.impl("adamw_step", adamw_step);
  m.impl("sgd_step", sgd_step);
}

#ifdef LWAS_CUDA
TORCH_LIBRARY_IMPL(lwas_fast, CUDA, m) {
  m.impl("adamw_step", adamw_step);
  m.impl("sgd_step", sgd_step);
}
#endif

TORCH_LIBRARY_IMPL(lwas_fast, Meta, m) {
  m.impl("adamw_step", adamw_step_meta);
  m.impl("sgd_step", sgd_step_meta);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "What was built, for lwas_fast.update.extension; the operators are torch.ops.lwas_fast's.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = TORCH_VERSION;
        info["interface"] = 7;  // lwas_fast.update.toolchain.INTERFACE
#ifdef LWAS_CUDA
        info["cuda"] = LWAS_CUDA;  // the architectures that were asked for
#else
        info["cuda"] = pybind11::none();
#endif
#ifdef __VERSION__
        info["compiler"] = __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
#ifdef __FLT16_MAX__
        info["float16_on_cpu"] = true;
#else
        info["float16_on_cpu"] = false;
#endif
        info["columns"] = std::map<std::string, int>{
            {"AVERAGE", lwas::kAverage}, {"WEIGHT", lwas::kWeight},     {"APPLIED", lwas::kApplied},
            {"CAPPED", lwas::kCapped},   {"SKIPPED", lwas::kSkipped},   {"LENGTH", lwas::kLength},
            {"SIZE", lwas::kSize},       {"ELEMENTS", lwas::kElements}, {"count", lwas::kColumns}};
        return info;
      },
      "The torch it was built for, the CUDA architectures or None, the compiler, and the table's columns.");
  m.def(
      "scratch_size",
      []([[maybe_unused]] const std::vector<int64_t>& sizes) -> int64_t {
#ifdef LWAS_CUDA
        return lwas::scratch_size(sizes);
#else
        return 0;
#endif
      },
      pybind11::arg("sizes"),
      "How many float64 numbers of scratch a step in two parts needs on CUDA for tensors of these sizes; on a CPU "
      "none.");
  m.def(
      "plan",
      [](const std::vector<int64_t>& sizes, int64_t chunk, int capacity) {
        std::vector<std::tuple<int, int, int64_t, int64_t>> launches;
        for (const lwas::Launch& l : lwas::plan(sizes, chunk, capacity)) {
          launches.emplace_back(l.first, l.last, l.start, l.chunks);
        }
        return launches;
      },
      pybind11::arg("sizes"), pybind11::arg("chunk"), pybind11::arg("capacity"),
      "How tensors of these sizes are cut into launches: (first tensor, last + 1, first chunk, chunks) of each.");
  m.def(
      "tensor_of",
      [](const std::vector<int64_t>& first_chunk, int64_t chunk) {
        return lwas::tensor_of(first_chunk.data(), int(first_chunk.size()), chunk);
      },
      pybind11::arg("first_chunk"), pybind11::arg("chunk"), "Which tensor a chunk of a launch belongs to.");
}
